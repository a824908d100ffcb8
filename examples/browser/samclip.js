/**
 * Text-prompted segmentation with onnxruntime-web: `examples/onnx_segmentation.py` in JavaScript.
 *
 *     const model = await SamClip.load("onnx/");
 *     const encoded = await model.encode(image); // an ImageBitmap; once for any number of texts and points
 *     const vocabulary = await model.embedVocabulary(["cat", "sofa"], ["a wall"], ["a photo of a {}"]);
 *     const segments = await model.segment(encoded, vocabulary);
 *     const { mask, score } = await model.segmentPoint(encoded, x, y);
 */

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1; // several threads need a page with cross-origin isolation
ort.env.logLevel = "error";

const MAX_OVERLAP = 0.5; // masks with a larger IoU are duplicates
const PROMPTS_PER_BATCH = 4;
const INSIDE = 1;
const NO_POINT = -1;

const floats = (values, shape) => new ort.Tensor("float32", Float32Array.from(values), shape);
const integers = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

export class SamClip {
  /** Loads the output of `samclip export` from a folder, an address that ends with "/". */
  static async load(folder) {
    const read = async (name) => {
      const response = await fetch(folder + name);
      if (!response.ok) throw new Error(`${folder}${name} cannot be loaded (${response.status}). Run samclip export.`);
      return response;
    };
    const model = new SamClip();
    model.description = await (await read("samclip.json")).json();
    model.sessions = {};
    for (const part of ["image_encoder", "mask_decoder", "segment_encoder", "text_encoder"]) {
      if (!model.description.parts.includes(part)) throw new Error(`${folder} contains no ${part}.`);
      const bytes = new Uint8Array(await (await read(`${part}.onnx`)).arrayBuffer());
      model.sessions[part] = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    }
    model.tokenizer = new Tokenizer(await (await read("tokenizer.json")).json(), {});
    return model;
  }

  /**
   * Runs the image encoder on an ImageBitmap, with the longest edge resized, and padding below or on the right. The
   * browser's resizing gives other pixels than Pillow's.
   */
  async encode(image) {
    const settings = this.description.image;
    const { padded_height: rows, padded_width: columns } = settings;
    const scale = settings.longest_edge / Math.max(image.width, image.height);
    const [width, height] = [image.width, image.height].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height).data;
    const values = new Float32Array(3 * rows * columns);
    for (let channel = 0; channel < 3; channel++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          const value = pixels[4 * (y * width + x) + channel] * settings.rescale_factor;
          values[(channel * rows + y) * columns + x] = (value - settings.mean[channel]) / settings.std[channel];
        }
      }
    }
    const outputs = await this.sessions.image_encoder.run({
      pixel_values: new ort.Tensor("float32", values, [1, 3, rows, columns]),
      reshaped_input_sizes: integers([height, width], [1, 2]),
    });
    return { outputs, contentSize: [height, width], imageSize: [image.height, image.width] };
  }

  /** Returns normalized text embeddings, one Float32Array for each text. */
  async embedTexts(texts) {
    const settings = this.description.text;
    const tokens = texts.map((text) => this.tokenizer.encode(text).ids);
    const longest = Math.max(...tokens.map((ids) => ids.length));
    if (longest > settings.max_tokens) {
      throw new Error(`A text has ${longest} tokens; the maximum is ${settings.max_tokens}.`);
    }
    const pad = (ids, value) => [...ids, ...Array(longest - ids.length).fill(value)];
    const shape = [texts.length, longest];
    const inputs = { input_ids: integers(tokens.flatMap((ids) => pad(ids, settings.pad_token_id)), shape) };
    if (settings.takes_mask) {
      inputs.attention_mask = integers(tokens.flatMap((ids) => pad(ids.map(() => 1), 0)), shape);
    }
    const { text_embeds: embeds } = await this.sessions.text_encoder.run(inputs);
    const length = embeds.dims[1];
    return texts.map((_, row) => embeds.data.slice(row * length, (row + 1) * length));
  }

  /**
   * Embeds labels, each as the average over all templates, which contain `{}` for the name. The background has complete
   * sentences without a template. If there are any, label 0 is background.
   */
  async embedVocabulary(labels, background, templates) {
    let names = labels;
    if (this.description.text.canonicalize) {
      templates = templates.map((template) => canonicalizeText(template, "{}"));
      [names, background] = [names, background].map((texts) => texts.map((text) => canonicalizeText(text, ",")));
    }
    const embeds = background.length ? await this.embedTexts(background) : [];
    for (const name of names) {
      const all = await this.embedTexts(templates.map((template) => template.replaceAll("{}", name)));
      const sum = all[0].map((_, index) => all.reduce((total, embed) => total + embed[index], 0));
      const norm = Math.hypot(...sum);
      embeds.push(sum.map((value) => value / norm));
    }
    if (!background.length) return { embeds, labelIds: labels.map((_, index) => index), names: labels, background: null };
    const labelIds = [...background.map(() => 0), ...labels.map((_, index) => index + 1)];
    return { embeds, labelIds, names: ["background", ...labels], background: 0 };
  }

  /** Returns the probabilities of the labels for an embedding. A label's most similar text counts. */
  classify(embed, vocabulary) {
    const logits = new Array(vocabulary.names.length).fill(-Infinity);
    vocabulary.embeds.forEach((text, index) => {
      const similarity = text.reduce((total, value, position) => total + value * embed[position], 0);
      const label = vocabulary.labelIds[index];
      logits[label] = Math.max(logits[label], similarity * this.description.logit_scale);
    });
    const highest = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - highest));
    const sum = powers.reduce((total, power) => total + power, 0);
    return powers.map((power) => power / sum);
  }

  /**
   * Predicts the masks of points. Each point is [x, y] in pixels of the resized image. Returns for each point its best
   * mask, `{ logits, score }`, with four cells of logits for each patch and the predicted IoU, which `rate` may change.
   */
  async predictMasks(encoded, points, rate = (_, score) => score) {
    const best = [];
    for (let start = 0; start < points.length; start += PROMPTS_PER_BATCH) {
      const chunk = points.slice(start, start + PROMPTS_PER_BATCH);
      const { pred_masks: masks, iou_scores: scores } = await this.sessions.mask_decoder.run({
        image_embeddings: encoded.outputs.image_embeddings,
        input_points: floats(chunk.flatMap((point) => [...point, 0, 0]), [1, chunk.length, 2, 2]),
        input_labels: integers(chunk.flatMap(() => [INSIDE, NO_POINT]), [1, chunk.length, 2]),
      });
      const [numMasks, rows, columns] = masks.dims.slice(2);
      for (let prompt = 0; prompt < chunk.length; prompt++) {
        const candidates = [];
        for (let index = 1; index < numMasks; index++) { // the first mask is for boxes and several points
          const position = prompt * numMasks + index;
          const logits = masks.data.slice(position * rows * columns, (position + 1) * rows * columns);
          candidates.push({ logits, rows, columns, score: rate(logits, scores.data[position]) });
        }
        best.push(candidates.reduce((first, second) => (second.score > first.score ? second : first)));
      }
    }
    return best;
  }

  /** Segments the object at x and y, in pixels of the image. Returns its mask, one byte for each pixel, and its score. */
  async segmentPoint(encoded, x, y) {
    const [scaleY, scaleX] = encoded.contentSize.map((side, axis) => side / encoded.imageSize[axis]);
    const [{ score, ...best }] = await this.predictMasks(encoded, [[x * scaleX, y * scaleY]]);
    return { score, mask: Uint8Array.from(this.resize(best, encoded), (logit) => logit > 0) };
  }

  /**
   * Segments an image by text. The CLIP head classifies every patch, points on the foreground prompt the mask decoder,
   * and the CLIP head classifies each mask. A pixel in several masks belongs to the best one. Returns segments
   * `{ label, score, mask }` in descending order of mask quality, without background.
   */
  async segment(encoded, vocabulary) {
    const { outputs, contentSize, imageSize } = encoded;
    const patchSize = this.description.image.patch_size;
    const [, channels, rows, columns] = outputs.dense_embeds.dims;
    const patches = rows * columns;
    const content = new Uint8Array(patches);
    const foreground = new Uint8Array(patches);
    for (let patch = 0; patch < patches; patch++) {
      content[patch] =
        Math.floor(patch / columns) * patchSize < contentSize[0] && (patch % columns) * patchSize < contentSize[1];
      if (!content[patch]) continue;
      const embed = Float32Array.from({ length: channels }, (_, c) => outputs.dense_embeds.data[c * patches + patch]);
      const probabilities = this.classify(embed, vocabulary);
      foreground[patch] = vocabulary.background === null || 1 - probabilities[vocabulary.background] > 0.5;
    }
    if (!foreground.includes(1)) return [];

    const cells = spreadPoints(foreground, columns, this.description.composition_points, vocabulary.background === null);
    const points = cells.map((cell) => [
      ((cell % columns) + 0.5) * patchSize - 0.5,
      (Math.floor(cell / columns) + 0.5) * patchSize - 0.5,
    ]);
    const masks = await this.predictMasks(encoded, points, (logits, score) => Math.max(score, 0) * stability(logits));
    const kept = removeDuplicates(masks);

    // The patches of an unmerged model's tower cover the image without its padding.
    const tower = this.description.tower_grid;
    const grid = tower === null ? [rows, columns] : [tower, tower];
    const covered = [rows, columns].map((side, axis) => {
      return tower === null ? side : (side * tower * patchSize) / contentSize[axis];
    });
    const segments = [];
    for (const [mask, inside] of assignPatches(kept, covered, grid)) {
      const own = inside.filter((patch) => tower !== null || content[patch]);
      if (!own.length) continue;
      const { segment_embeds: embeds } = await this.sessions.segment_encoder.run({
        patch_tokens: outputs.patch_tokens,
        rows: integers(own.map((patch) => Math.floor(patch / grid[1])), [own.length]),
        columns: integers(own.map((patch) => patch % grid[1]), [own.length]),
      });
      segments.push({ mask, probabilities: this.classify(embeds.data, vocabulary) });
    }

    const bestScore = new Float32Array(imageSize[0] * imageSize[1]);
    const best = new Int32Array(bestScore.length).fill(-1);
    segments.forEach(({ mask }, position) => {
      this.resize(mask, encoded).forEach((logit, pixel) => {
        const score = logit > 0 ? mask.score / (1 + Math.exp(-logit)) : 0;
        if (score > bestScore[pixel]) [best[pixel], bestScore[pixel]] = [position, score];
      });
    });
    return segments
      .map(({ probabilities }, position) => {
        const label = probabilities.indexOf(Math.max(...probabilities));
        const mask = Uint8Array.from(best, (owner) => owner === position);
        return { labelId: label, label: vocabulary.names[label], score: probabilities[label], mask };
      })
      .filter(({ labelId }) => labelId !== vocabulary.background);
  }

  /** Resizes the part of a mask without padding bilinearly to the size of the image. */
  resize({ logits, rows, columns }, { contentSize, imageSize }) {
    const { padded_height, padded_width } = this.description.image;
    const axes = [[rows, padded_height], [columns, padded_width]].map(([side, padded], axis) => {
      const cells = (contentSize[axis] * side) / padded;
      return Array.from({ length: imageSize[axis] }, (_, pixel) => {
        const position = Math.min(Math.max(((pixel + 0.5) * cells) / imageSize[axis] - 0.5, 0), side - 1);
        const below = Math.floor(position);
        return [below, Math.min(below + 1, side - 1), position - below];
      });
    });
    const result = new Float32Array(imageSize[0] * imageSize[1]);
    let pixel = 0;
    for (const [top, bottom, down] of axes[0]) {
      for (const [left, right, across] of axes[1]) {
        const upper = logits[top * columns + left] * (1 - across) + logits[top * columns + right] * across;
        const lower = logits[bottom * columns + left] * (1 - across) + logits[bottom * columns + right] * across;
        result[pixel++] = upper * (1 - down) + lower * down;
      }
    }
    return result;
  }
}

/** Converts a name or a template for SigLIP: lower case, no punctuation other than `keep`, spaces instead of "_". */
function canonicalizeText(text, keep) {
  const parts = text.replaceAll("_", " ").split(keep).map((part) => part.replace(/[!-/:-@[-`{-~]/g, ""));
  return parts.join(keep).toLowerCase().replace(/\s+/g, " ").trim();
}

/** Selects `numPoints` of the marked cells, evenly spaced in reading order or along a Z-order curve. */
function spreadPoints(marked, columns, numPoints, inZOrder) {
  const cells = [...marked.keys()].filter((cell) => marked[cell]);
  if (inZOrder) {
    const key = (cell) => {
      let [row, column, bits] = [Math.floor(cell / columns), cell % columns, 0];
      for (let bit = 0; bit < 10; bit++) bits |= (((row >> bit) & 1) << (2 * bit + 1)) | (((column >> bit) & 1) << (2 * bit));
      return bits;
    };
    cells.sort((first, second) => key(first) - key(second));
  }
  return Array.from({ length: numPoints }, (_, index) => cells[Math.floor(((index + 0.5) * cells.length) / numPoints)]);
}

/** The IoU of the masks at the thresholds 1 and -1. */
function stability(logits) {
  let [inner, outer] = [0, 0];
  for (const logit of logits) {
    inner += logit > 1;
    outer += logit > -1;
  }
  return inner / Math.max(outer, 1);
}

/** Non-maximum suppression. Returns masks that are not empty, in descending order of scores. */
function removeDuplicates(masks) {
  const kept = [];
  for (const mask of [...masks].sort((first, second) => second.score - first.score)) {
    const area = mask.logits.reduce((total, logit) => total + (logit > 0), 0);
    const isDuplicate = kept.some((other) => {
      const common = mask.logits.reduce((total, logit, cell) => total + (logit > 0 && other.logits[cell] > 0), 0);
      return common > MAX_OVERLAP * Math.max(area + other.area - common, 1);
    });
    if (area > 0 && !isDuplicate) kept.push({ ...mask, area });
  }
  return kept;
}

/**
 * Assigns the patches of a grid to masks that cover `covered` rows and columns of it. A mask contains the patches that it
 * covers by half or more, or else the patch that it covers most; a patch in several masks belongs to the first.
 */
function assignPatches(masks, covered, [rows, columns]) {
  const taken = new Uint8Array(rows * columns);
  const overlaps = (cells, length, patches) =>
    Array.from({ length: patches }, (_, patch) => {
      const shares = Array.from({ length: cells }, (_, cell) => {
        const [start, end] = [(cell * length) / cells, ((cell + 1) * length) / cells];
        return Math.max(Math.min(end, patch + 1) - Math.max(start, patch), 0);
      });
      const sum = Math.max(shares.reduce((total, share) => total + share, 0), 1e-6);
      return shares.map((share, cell) => [cell, share / sum]).filter(([, share]) => share > 0);
    });
  return masks.map((mask) => {
    const vertical = overlaps(mask.rows, covered[0], rows);
    const horizontal = overlaps(mask.columns, covered[1], columns);
    const coverage = new Float32Array(rows * columns);
    vertical.forEach((cellsY, row) =>
      horizontal.forEach((cellsX, column) => {
        for (const [y, shareY] of cellsY) {
          for (const [x, shareX] of cellsX) {
            if (mask.logits[y * mask.columns + x] > 0) coverage[row * columns + column] += shareY * shareX;
          }
        }
      }),
    );
    const highest = coverage.reduce((first, second) => Math.max(first, second), 0);
    const inside = [...coverage.keys()].filter(
      (patch) => coverage[patch] >= 0.5 - 1e-4 || (coverage[patch] >= highest && highest > 0),
    );
    const own = inside.filter((patch) => !taken[patch]);
    inside.forEach((patch) => (taken[patch] = 1));
    return [mask, own];
  });
}
