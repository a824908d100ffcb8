/** The page: an image, labels and clicks become masks. The image encoder runs once for each image. */

import { SamClip } from "./samclip.js";

const COLORS = [[230, 60, 60], [60, 90, 230], [60, 180, 75], [240, 180, 30], [170, 60, 200]];
const find = (id) => document.getElementById(id);
const list = (id) => find(id).value.split(",").map((text) => text.trim()).filter(Boolean);

/** What the page shows. `runs` counts the runs of the image encoder. */
export const state = { model: null, image: null, encoded: null, segments: [], runs: 0 };

/** Runs one action at a time and shows its result or error. */
async function perform(message, action) {
  if (find("segment").dataset.busy) return;
  find("segment").dataset.busy = "true";
  find("segment").disabled = true;
  find("status").textContent = message;
  try {
    find("status").textContent = await action();
  } catch (error) {
    find("status").textContent = `Error: ${error.message}`;
  }
  delete find("segment").dataset.busy;
  find("segment").disabled = !state.encoded;
}

function show(segments) {
  state.segments = segments;
  const canvas = find("canvas");
  [canvas.width, canvas.height] = [state.image.width, state.image.height];
  const context = canvas.getContext("2d");
  context.drawImage(state.image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  segments.forEach(({ mask }, number) => {
    const color = COLORS[number % COLORS.length];
    mask.forEach((inside, pixel) => {
      if (!inside) return;
      for (let channel = 0; channel < 3; channel++) {
        pixels.data[4 * pixel + channel] = 0.4 * pixels.data[4 * pixel + channel] + 0.6 * color[channel];
      }
    });
  });
  context.putImageData(pixels, 0, 0);
  find("segments").replaceChildren(
    ...segments.map(({ label, score }, number) => {
      const item = document.createElement("li");
      item.textContent = `${label}: ${score.toFixed(3)}`;
      item.style.color = `rgb(${COLORS[number % COLORS.length]})`;
      return item;
    }),
  );
}

find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (!file) return;
  perform("Running the image encoder.", async () => {
    state.encoded = null;
    state.image = await createImageBitmap(file);
    show([]);
    state.encoded = await state.model.encode(state.image);
    state.runs += 1;
    return "Select Segment, or click an object in the image.";
  });
});

find("segment").addEventListener("click", () => {
  perform("Segmenting.", async () => {
    if (!list("labels").length) throw new Error("Enter a label.");
    if (!find("template").value.includes("{}")) throw new Error("The template must contain {} for the label.");
    const vocabulary = await state.model.embedVocabulary(list("labels"), list("background"), [find("template").value]);
    show(await state.model.segment(state.encoded, vocabulary));
    return state.segments.length ? `Segments: ${state.segments.length}.` : "No segments.";
  });
});

find("canvas").addEventListener("click", (event) => {
  if (!state.encoded) return;
  const box = event.target.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * state.image.width;
  const y = ((event.clientY - box.top) / box.height) * state.image.height;
  perform("Predicting a mask.", async () => {
    const { mask, score } = await state.model.segmentPoint(state.encoded, x, y);
    show([{ label: `point (${Math.round(x)}, ${Math.round(y)}), predicted IoU`, score, mask }]);
    return "Mask of the point.";
  });
});

perform("Loading the model.", async () => {
  state.model = await SamClip.load(new URLSearchParams(location.search).get("onnx") ?? "onnx/");
  find("file").disabled = false;
  return "Choose an image.";
});
