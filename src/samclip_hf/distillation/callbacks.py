"""Callbacks of the trainer."""

import signal
import threading
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PreemptionCallback(TrainerCallback):
    """
    Ends the training with a checkpoint after the current step on SIGTERM or SIGINT (Ctrl-C). A second Ctrl-C
    interrupts at once.

    Attributes:
        signal (`signal.Signals`, *optional*):
            The signal that ended the training, in any process.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Installs the signal handlers."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self._received = signal.Signals(number)
        logger.warning(f"Received {self._received.name}: saving a checkpoint after the current step.")
        if self._received == signal.SIGINT:  # not SIGTERM, which launchers and schedulers may send twice
            signal.signal(number, self._previous_handlers[self._received])

    def on_step_end(self, args, state, control, **kwargs):
        """Stops all processes with a checkpoint if one of them received a signal."""
        number = int(gather(torch.tensor([self._received or 0], device=args.device)).max())
        if number:
            self.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Restores the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
