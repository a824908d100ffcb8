// Keyboard access to the image: it can be focused, arrow keys move a cursor (with Shift in larger steps), Enter or the
// space bar clicks at the cursor, and Backspace clicks "Undo". Keys change the values of sliders. Gradio's image and
// sliders react to the pointer alone.
() => {
  const FRAME = "#input_image .image-frame";
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const cursor = document.createElement("div");
  cursor.id = "cursor";
  cursor.hidden = true;
  const position = document.createElement("div");
  position.id = "cursor_position";
  position.setAttribute("aria-live", "polite");
  let x = 0.5, y = 0.5; // fractions of the image

  // The rectangle of the image without the margins of its element. Gradio does not enlarge images.
  function content(image) {
    const outer = image.getBoundingClientRect();
    const scale = Math.min(outer.width / image.naturalWidth, outer.height / image.naturalHeight, 1);
    const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
    return { left: outer.left + (outer.width - width) / 2, top: outer.top + (outer.height - height) / 2, width, height };
  }

  function place(image) {
    const { left, top, width, height } = content(image);
    cursor.style.left = `${left + window.scrollX + x * width}px`;
    cursor.style.top = `${top + window.scrollY + y * height}px`;
    position.textContent = `${Math.round(100 * x)} % from the left, ${Math.round(100 * y)} % from the top`;
  }

  function prepare() {
    document.querySelector("#next_step")?.setAttribute("aria-live", "polite");
    document.querySelectorAll("#scenes .gallery-item").forEach((button, index) => {
      button.setAttribute("aria-label", `Example ${index + 1}`);
    });
    const frame = document.querySelector(FRAME);
    if (!frame) {
      cursor.hidden = true;
    } else if (frame.tabIndex !== 0) {
      frame.tabIndex = 0;
      frame.setAttribute("role", "application");
      frame.setAttribute("aria-label", "Image. Arrow keys move a cursor, Enter clicks at it, Backspace undoes.");
    }
  }

  document.body.append(cursor, position);
  new MutationObserver(prepare).observe(document.body, { childList: true, subtree: true });
  prepare();
  document.addEventListener("focusin", (event) => {
    cursor.hidden = !event.target.matches(`${FRAME}:focus-visible`);
    if (!cursor.hidden) place(event.target.querySelector("img"));
  });
  window.addEventListener("resize", () => (cursor.hidden = true));
  // A slider sends its value when the pointer is released.
  document.addEventListener("keyup", ({ key, target }) => {
    const isRange = target.type === "range" && /^(Arrow|Page|Home|End)/.test(key);
    if (isRange || (target.type === "number" && key === "Enter")) {
      target.dispatchEvent(new Event("pointerup", { bubbles: true }));
    }
  });
  document.addEventListener("keydown", (event) => {
    const image = event.target.matches(FRAME) && event.target.querySelector("img");
    if (!image || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in STEPS) {
      const step = event.shiftKey ? 0.1 : 0.01;
      x = Math.min(Math.max(x + STEPS[event.key][0] * step, 0), 0.999);
      y = Math.min(Math.max(y + STEPS[event.key][1] * step, 0), 0.999);
      cursor.hidden = false;
      place(image);
    } else if (event.key === "Enter" || event.key === " ") {
      const { left, top, width, height } = content(image);
      const options = { bubbles: true, clientX: left + x * width, clientY: top + y * height };
      image.dispatchEvent(new MouseEvent("click", options));
    } else if (event.key === "Backspace") {
      document.querySelector("#undo").click();
    } else {
      return;
    }
    event.preventDefault();
  });
}
