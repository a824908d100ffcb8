# Every target works in a fresh clone: the first one creates the environment .venv and installs the package into it.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin

.PHONY: help shell demo tables app screenshots test test-all test-lowest test-app test-transformers chromium \
	browser-modules lint docs bench bench-gpu

help:
	@echo 'make shell              a shell in which samclip, accelerate and python are those of .venv'
	@echo 'make demo               train and evaluate the miniature, and draw the result (20 minutes)'
	@echo 'make app                the app in the browser'
	@echo 'make test               the tests, without the slow ones'
	@echo 'make test-all           all tests'
	@echo 'make test-app           the tests of the app and of the browser example in Chromium'
	@echo "make test-transformers  transformers' own model tests on the models of this package"
	@echo 'make test-lowest        tests with the lowest supported versions, in .venv-lowest'
	@echo 'make lint               ruff and mypy'
	@echo 'make docs               the documentation, in site/'
	@echo 'make bench              benchmarks on the CPU (bench-gpu: on a GPU)'
	@echo "make tables             the miniature's tables in docs/tables (several hours)"
	@echo 'make screenshots        the screenshots of the app in docs/images'

shell: $(VENV)/installed
	@echo 'if [ -f ~/.bashrc ]; then . ~/.bashrc; fi; . "$(abspath $(BIN))/activate"' > $(VENV)/bashrc
	@bash --init-file $(VENV)/bashrc

# By default, glibc returns freed large tensors to the system and zeroes the memory again in the next step. Keeping the
# memory makes training steps on the CPU up to twice as fast. Other C libraries ignore these variables.
demo tables: export MALLOC_MMAP_THRESHOLD_ = 2000000000
demo tables: export MALLOC_TRIM_THRESHOLD_ = 4000000000
demo: $(VENV)/installed
	$(BIN)/python -m samclip_hf.miniature_lab.demo

# Two processes with one thread each share the runs. Can be interrupted and restarted. Commit the result. The seeds whose
# results are in docs/tables are not run again: `rm -r docs/tables/*.json runs/tables` repeats them.
tables: export OMP_NUM_THREADS = 1
tables: $(VENV)/installed
	mkdir -p runs/tables docs/tables
	cp docs/tables/teachers.json docs/tables/seed*.json runs/tables/ 2> /dev/null || true
	$(BIN)/python -m samclip_hf.miniature_lab.tables & other=$$!; \
		$(BIN)/python -m samclip_hf.miniature_lab.tables && wait $$other
	cp runs/tables/*.json runs/tables/tables.md runs/tables/tables.png docs/tables/

# Uses the shipped miniature. SAMCLIP_CHECKPOINT=FOLDER selects another model.
app: $(VENV)/installed
	$(BIN)/python demo/app.py

# One process per core with one thread each: with more threads than cores, the tests take several times as long.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test test-all test-app: export OMP_NUM_THREADS = 1
test: $(VENV)/installed
	$(PYTEST) -m 'not browser and not slow' $(TESTS)

test-all: $(VENV)/installed
	$(PYTEST)

# Installs Chromium with apt-get if it is missing and apt-get may be used. Without Chromium, the tests are skipped.
test-app: $(VENV)/installed chromium browser-modules
	$(BIN)/python -m pytest -rs -m browser tests/test_app.py tests/test_browser_example.py

screenshots: $(VENV)/installed chromium
	$(BIN)/python -m tests.screenshots

chromium:
	@if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -qq --no-install-recommends chromium chromium-driver > /dev/null || \
		echo 'Chromium could not be installed.'; \
	fi

# The libraries of the example in the browser. Without them, its tests are skipped.
browser-modules:
	@if command -v npm > /dev/null && [ ! -e examples/browser/node_modules ]; then \
		npm install --prefix examples/browser --silent --no-package-lock --ignore-scripts --no-audit --no-fund || \
		echo 'onnxruntime-web could not be installed.'; \
	fi

# Downloads the tests of the installed transformers version once. They define markers of their own, so the settings in
# pyproject.toml are not used.
test-transformers: $(VENV)/installed
	$(BIN)/python -m tests.transformers.sdist
	$(BIN)/python -m pytest -q -rs --disable-warnings -o addopts= -o python_files='*.py' tests/transformers

# With TESTS=..., only these files or folders.
test-lowest:
	$(MAKE) test test-transformers VENV=.venv-lowest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# Image encoder and text to masks, compared with the models of transformers.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/inference.py encoder
	$(BIN)/python benchmarks/inference.py text_to_masks
	$(BIN)/python benchmarks/training_step.py

bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/inference.py encoder --device cuda --dtype bfloat16 --batch_sizes 1 8 32 --compile
	$(BIN)/python benchmarks/inference.py text_to_masks --device cuda --dtype bfloat16
	$(BIN)/python benchmarks/training_step.py --device cuda --clip_batch_size 64 --sam_batch_size 4 --compile

.venv-lowest/installed: PINS = 'torch==2.11.*' 'torchvision==0.26.*' 'transformers==5.17.*' 'accelerate==1.15.*'
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is required: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PINS)
	@touch $@
