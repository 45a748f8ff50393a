"use strict";
// The case viewer of a report: slices with true and predicted boxes, operating points, the findings
// of a case. Everything comes from the JSON block #report-data; the state lives in the URL's hash.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const viewer = document.getElementById("viewer");
  if (!viewer || !data.cases.length) return;
  const AXES = [
    { name: "z plane (axial)", rows: 1, columns: 2, flip: false },
    { name: "y plane (coronal)", rows: 0, columns: 2, flip: true },
    { name: "x plane (sagittal)", rows: 0, columns: 1, flip: true },
  ];
  const SVG = "http:" + "//www.w3.org/2000/svg"; // a namespace, never loaded
  const MAX_HIDDEN_ROWS = 8; // predictions below the threshold that the table of findings lists
  const FPPI_NAMES = ["1/8", "1/4", "1/2", "1", "2", "4", "8"];
  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const shape = (tag, attributes, parent) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.append(node);
    return node;
  };
  const percent = (part, whole) => (whole ? (part / whole).toFixed(3) : "n/a");
  const className = (label) => data.classes[label] ?? `class ${label}`;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  const state = {
    case: 0,
    arm: 0, // index, or -1: all arms side by side
    iou: data.iou[0],
    at: [0, 0, 0], // slice along z, y, x
    focus: null, // {arm, kind: "truth" | "prediction", row}
    levels: data.arms.map((arm) => arm.default_score), // predictions below are hidden
    window: null,
    smooth: true,
  };

  // ---- tables ------------------------------------------------------------------------------
  for (const arm of data.arms) {
    arm.rowsOfCase = { truth: new Map(), predictions: new Map() };
    for (const kind of ["truth", "predictions"])
      arm[kind].case.forEach((index, row) => {
        const rows = arm.rowsOfCase[kind];
        rows.set(index, [...(rows.get(index) ?? []), row]);
      });
    arm.scores = [...new Set(arm.predictions.score)].sort((a, b) => a - b);
  }
  const rowsOf = (arm, kind, index) => arm.rowsOfCase[kind].get(index) ?? [];

  function finders(arm) { // best score that finds each true object at the current IoU
    const found = new Array(arm.truth.case.length).fill(null);
    arm.matched[state.iou].forEach((row, prediction) => {
      if (row >= 0) found[row] = prediction;
    });
    return found;
  }

  function counts(a, only = null) {
    const arm = data.arms[a];
    const inside = (index) => only === null || index === only;
    let hits = 0, falses = 0;
    arm.predictions.case.forEach((index, row) => {
      if (!inside(index) || arm.predictions.score[row] < state.levels[a]) return;
      const match = arm.matched[state.iou][row];
      if (match >= 0) hits += 1;
      else if (match === -1) falses += 1;
    });
    const objects = arm.truth.case.filter(inside).length;
    return { hits, falses, objects, missed: objects - hits };
  }

  function levelForRate(a, rate) { // lowest score with at most `rate` false positives per image
    const arm = data.arms[a];
    const falses = arm.predictions.score
      .filter((_, row) => arm.matched[state.iou][row] === -1)
      .sort((x, y) => y - x);
    const allowed = Math.floor(rate * arm.cases.length + 1e-9);
    const barred = falses.length > allowed ? falses[allowed] : -Infinity;
    return arm.scores.find((score) => score > barred) ?? (arm.scores.at(-1) ?? 0) + 1e-6;
  }

  // ---- pixels ------------------------------------------------------------------------------
  const decoded = new Map();
  async function pixels(index) {
    if (!decoded.has(index)) decoded.set(index, decode(data.cases[index].pictures));
    return decoded.get(index);
  }
  async function decode(pictures) {
    if (!pictures) return null;
    return Promise.all(pictures.stacks.map(async (stack) => {
      const image = new Image();
      image.src = stack.image;
      await image.decode();
      const canvas = element("canvas", { width: image.width, height: image.height });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      return { ...stack, rgba: context.getImageData(0, 0, image.width, image.height) };
    }));
  }
  function tileReader(stack, number) {
    const top = Math.floor(number / stack.columns) * stack.pitch[0];
    const left = (number % stack.columns) * stack.pitch[1];
    return (row, column) => stack.rgba.data[4 * ((top + row) * stack.rgba.width + left + column)];
  }
  function planeOf(pictures, stacks, axis, index) { // {height, width, read(row, column)} or null
    const whole = stacks.find((stack) => stack.whole);
    if (whole && axis) {
      const [depth, height, width] = pictures.shape;
      const readers = Array.from({ length: depth }, (_, z) => tileReader(whole, z));
      return axis === 1
        ? { height: depth, width, read: (z, x) => readers[z](index, x) }
        : { height: depth, width: height, read: (z, y) => readers[z](y, index) };
    }
    const stack = stacks.find((s) => s.axis === axis && s.indices.includes(index));
    if (!stack) return null;
    const read = tileReader(stack, stack.indices.indexOf(index));
    return { height: stack.tile[0], width: stack.tile[1], read };
  }
  function available(pictures, axis) { // indices along `axis` that can be shown
    if (pictures.stacks.some((stack) => stack.whole))
      return Array.from({ length: pictures.shape[axis] }, (_, i) => i);
    const indices = pictures.stacks.filter((s) => s.axis === axis).flatMap((s) => s.indices);
    return indices.sort((a, b) => a - b);
  }
  const nearest = (values, wanted) =>
    values.reduce((best, v) => (Math.abs(v - wanted) < Math.abs(best - wanted) ? v : best), values[0]);

  // ---- controls ----------------------------------------------------------------------------
  const find = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const parts = Object.fromEntries(
    ["case", "arm", "iou", "rate", "operating", "planes", "findings", "message", "previous", "next",
      "low", "high", "smooth", "live"].map((name) => [name, find(name)]));

  function setUp() {
    data.arms.forEach((arm, a) => parts.arm.append(new Option(arm.name, a)));
    if (data.arms.length > 1) parts.arm.append(new Option("side by side", -1));
    data.iou.forEach((key) => parts.iou.append(new Option(Number(key), key)));
    parts.rate.append(new Option("choose", ""));
    data.fppi.forEach((rate, i) => parts.rate.append(new Option(FPPI_NAMES[i] ?? rate, rate)));
    parts.case.addEventListener("change", () => showCase(Number(parts.case.value)));
    parts.arm.addEventListener("change", () => update({ arm: Number(parts.arm.value), focus: null }));
    parts.iou.addEventListener("change", () => update({ iou: parts.iou.value }));
    parts.rate.addEventListener("change", () => {
      if (parts.rate.value === "") return;
      update({ levels: data.arms.map((_, a) => levelForRate(a, Number(parts.rate.value))) });
      parts.rate.value = "";
    });
    parts.previous.addEventListener("click", () => stepCase(-1));
    parts.next.addEventListener("click", () => stepCase(1));
    for (const name of ["low", "high"])
      parts[name].addEventListener("input", () =>
        update({ window: [Number(parts.low.value), Number(parts.high.value)] }));
    parts.smooth.addEventListener("change", () => update({ smooth: parts.smooth.checked }));
    buildOperatingTable();
    viewer.addEventListener("keydown", onKey);
    window.addEventListener("resize", render);
    window.addEventListener("hashchange", readHash);
  }

  function buildOperatingTable() {
    data.arms.forEach((arm, a) => {
      const slider = element("input", {
        type: "range", min: 0, max: arm.scores.length, step: 1,
        ariaLabel: `score threshold of ${arm.name}`,
      });
      slider.addEventListener("input", () => {
        const levels = [...state.levels];
        levels[a] = arm.scores[slider.value] ?? (arm.scores.at(-1) ?? 0) + 1e-6;
        update({ levels });
      });
      const row = element("tr", {}, element("th", { scope: "row", textContent: arm.name }),
        element("td", {}, slider));
      for (let i = 0; i < 6; i += 1) row.append(element("td"));
      parts.operating.append(row);
    });
  }

  function onKey(event) {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      ArrowUp: () => stepSlice(1), ArrowDown: () => stepSlice(-1),
      ArrowRight: () => stepFinding(1), ArrowLeft: () => stepFinding(-1),
      PageDown: () => stepCase(1), PageUp: () => stepCase(-1),
      a: () => update({ arm: (Number(state.arm) + 2) % (data.arms.length + 1) - 1, focus: null }),
    };
    const action = actions[event.key];
    if (!action || (event.key === "a" && data.arms.length < 2)) return;
    event.preventDefault();
    action();
  }

  // ---- movement ----------------------------------------------------------------------------
  const shownArms = () => (state.arm < 0 ? data.arms.map((_, a) => a) : [state.arm]);
  function findingsOf(index) { // missed objects, found objects, then predictions by score
    const list = [];
    for (const a of shownArms()) {
      const arm = data.arms[a], found = finders(arm);
      const truth = rowsOf(arm, "truth", index).map((row) => {
        const by = found[row];
        const score = by === null ? null : arm.predictions.score[by];
        return { arm: a, kind: "truth", row, box: arm.truth.box[row], label: arm.truth.label[row],
          score, missed: score === null || score < state.levels[a] };
      });
      truth.sort((p, q) => q.missed - p.missed || p.row - q.row);
      const predictions = rowsOf(arm, "predictions", index).map((row) => ({
        arm: a, kind: "prediction", row, box: arm.predictions.box[row],
        label: arm.predictions.label[row], score: arm.predictions.score[row],
        match: arm.matched[state.iou][row], reason: arm.reasons[state.iou][row],
        hidden: arm.predictions.score[row] < state.levels[a],
      }));
      predictions.sort((p, q) => q.score - p.score || p.row - q.row);
      list.push(...truth, ...predictions);
    }
    return list;
  }
  const centre = (box) => [0, 1, 2].map((k) => Math.floor((box[k] + box[k + 3]) / 2 - 1e-6));

  function showCase(index, extra = {}) {
    state.case = index;
    state.focus = null;
    state.window = null;
    const first = findingsOf(index).find((finding) => !finding.hidden);
    const pictures = data.cases[index].pictures;
    const size = pictures ? pictures.shape : [1, 1, 1];
    const at = first ? centre(first.box) : size.map((n) => Math.floor(n / 2));
    update({ at, focus: first ? { arm: first.arm, kind: first.kind, row: first.row } : null, ...extra });
  }
  function worstCase() { // most missed objects over all arms, then most false positives
    const cost = data.cases.map((_, index) => data.arms.reduce((sum, _arm, a) => {
      const { missed, falses } = counts(a, index);
      return sum + 1000 * missed + falses;
    }, 0));
    return cost.indexOf(Math.max(...cost));
  }
  const stepCase = (by) => showCase((state.case + by + data.cases.length) % data.cases.length);
  function stepSlice(by) {
    const pictures = data.cases[state.case].pictures;
    if (!pictures) return;
    const values = available(pictures, 0);
    if (!values.length) return;
    const now = values.indexOf(nearest(values, state.at[0]));
    update({ at: [values[clamp(now + by, 0, values.length - 1)], state.at[1], state.at[2]] });
  }
  function stepFinding(by) {
    const list = findingsOf(state.case).filter((finding) => !finding.hidden);
    if (!list.length) return;
    const now = list.findIndex((finding) => isFocus(finding));
    focusOn(list[(now + by + list.length) % list.length]);
  }
  const isFocus = (f) => state.focus !== null && f.arm === state.focus.arm
    && f.kind === state.focus.kind && f.row === state.focus.row;
  const focusOn = (f) => update({ at: centre(f.box), focus: { arm: f.arm, kind: f.kind, row: f.row } });

  // ---- the hash ----------------------------------------------------------------------------
  function readHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.has("case")) return false;
    const index = data.cases.findIndex((entry) => entry.id === wanted.get("case"));
    if (index < 0) return false;
    const named = data.arms.findIndex((arm) => arm.name === wanted.get("arm"));
    if (named >= 0) state.arm = named;
    else if (wanted.get("arm") === "all") state.arm = -1;
    if (data.iou.includes(wanted.get("iou"))) state.iou = wanted.get("iou");
    if (wanted.has("score")) state.levels = state.levels.map(() => Number(wanted.get("score")));
    state.case = index;
    const finding = /^([tp])(\d+)$/.exec(wanted.get("object") ?? "");
    const kind = finding && (finding[1] === "t" ? "truth" : "prediction");
    const known = finding && findingsOf(index).find((f) => f.kind === kind && f.row === Number(finding[2]));
    if (known) {
      if (known.hidden) state.levels[known.arm] = Math.min(state.levels[known.arm], known.score);
      focusOn(known);
    } else showCase(index);
    const at = ["slice", "row", "column"].map((name, k) =>
      wanted.has(name) ? Number(wanted.get(name)) || 0 : state.at[k]);
    update({ at });
    return true;
  }
  function writeHash() {
    const arm = state.arm < 0 ? "all" : data.arms[state.arm].name;
    const content = new URLSearchParams({ case: data.cases[state.case].id, arm, slice: state.at[0],
      row: state.at[1], column: state.at[2], iou: state.iou });
    history.replaceState(null, "", `#${content}`);
  }

  // ---- drawing -----------------------------------------------------------------------------
  let touched = false;
  function update(changes) {
    Object.assign(state, changes);
    if (touched) writeHash();
    render();
  }

  function render() {
    renderControls();
    renderOperating();
    renderFindings();
    renderPlanes();
  }

  function renderControls() {
    const first = state.arm < 0 ? 0 : state.arm;
    parts.case.replaceChildren(...data.cases.map((entry, index) => {
      const { objects, missed, falses } = counts(first, index);
      return new Option(`${entry.id} · ${objects} object${objects === 1 ? "" : "s"}, ` +
        `${missed} missed, ${falses} false`, index);
    }));
    parts.case.value = state.case;
    parts.arm.value = state.arm;
    parts.iou.value = state.iou;
    const pictures = data.cases[state.case].pictures;
    const [low, high] = state.window ?? pictures?.window ?? [0, 255];
    parts.low.value = low;
    parts.high.value = high;
  }

  function renderOperating() {
    data.arms.forEach((arm, a) => {
      const { hits, falses, objects, missed } = counts(a);
      const row = parts.operating.children[a];
      const rate = arm.cases.length ? falses / arm.cases.length : 0;
      const above = arm.scores.findIndex((score) => score >= state.levels[a]);
      row.querySelector("input").value = above < 0 ? arm.scores.length : above;
      const level = above < 0 ? "above all" : `≥ ${state.levels[a].toPrecision(3)}`;
      [level, `${hits} of ${objects}`, missed, percent(hits, objects), falses, rate.toFixed(2)]
        .forEach((text, i) => { row.children[i + 2].textContent = text; });
      if (shownArms().includes(a))
        parts.live.textContent = `${arm.name}: sensitivity ${percent(hits, objects)}, ` +
          `${rate.toFixed(2)} false positives per image`;
      markCharts(a, rate, objects ? hits / objects : 0);
    });
  }
  function markCharts(a, rate, sensitivity) { // the operating point on the FROC curve
    for (const chart of document.querySelectorAll("svg[data-marker]")) {
      chart.querySelector(`[data-arm="${a}"]`)?.remove();
      if (chart.dataset.marker !== `froc-${state.iou}`) continue;
      const [low, high] = chart.dataset.x.split(",").map(Number);
      const [left, top, width, height] = chart.dataset.plot.split(",").map(Number);
      const share = clamp(Math.log(Math.max(rate, low) / low) / Math.log(high / low), 0, 1);
      const group = shape("g", { class: `operating style${a % 4}`, "data-arm": a }, chart);
      shape("circle", { cx: left + share * width, cy: top + (1 - sensitivity) * height, r: 5.5 }, group);
      shape("title", {}, group).textContent = `${data.arms[a].name} at the viewer's score threshold`;
    }
  }

  function renderFindings() {
    const pictures = data.cases[state.case].pictures;
    const spacing = pictures?.spacing ?? [1, 1, 1];
    const body = parts.findings;
    body.replaceChildren();
    const list = findingsOf(state.case);
    const hidden = list.filter((finding) => finding.hidden);
    const left = new Set(hidden.slice(MAX_HIDDEN_ROWS));
    for (const finding of list) {
      if (left.has(finding) && !isFocus(finding)) continue;
      const size = [0, 1, 2].map((k) => (finding.box[k + 3] - finding.box[k]) * spacing[k]);
      const button = element("button", { className: "link", type: "button",
        textContent: describe(finding) });
      button.addEventListener("click", () => focusOn(finding));
      const row = element("tr", { className: (isFocus(finding) ? "current " : "") +
        (finding.hidden ? "hidden-by-score" : "") },
        element("td", {}, button),
        element("td", { textContent: className(finding.label) }),
        element("td", { textContent: data.arms[finding.arm].name }),
        element("td", { textContent: finding.kind === "prediction" ? finding.score.toPrecision(3) : "" }),
        element("td", { textContent: size.map((s) => s.toFixed(pictures ? 0 : 1)).join(" × ") }),
        element("td", { textContent: centre(finding.box).join(", ") }));
      body.append(row);
    }
    if (left.size) body.append(element("tr", { className: "hidden-by-score" }, element("td", { colSpan: 6,
      textContent: `and ${left.size} more predictions below the score threshold` })));
    if (!list.length) body.append(element("tr", {}, element("td", { colSpan: 6,
      textContent: "No true object and no prediction in this case." })));
  }
  function describe(finding) {
    if (finding.kind === "truth") {
      if (!finding.missed) return `true object, found with score ${finding.score.toPrecision(3)}`;
      if (finding.score === null) return "true object, MISSED";
      return `true object, MISSED (a prediction of score ${finding.score.toPrecision(3)} is hidden)`;
    }
    const hidden = finding.hidden ? ", hidden" : "";
    if (finding.match >= 0) return `prediction, hit${hidden}`;
    if (finding.match === -1) return `prediction, FALSE: ${finding.reason}${hidden}`;
    return `prediction, beyond the 100 counted${hidden}`;
  }

  let drawing = 0;
  async function renderPlanes() {
    const ticket = (drawing += 1);
    const entry = data.cases[state.case];
    const stacks = await pixels(state.case);
    if (ticket !== drawing) return; // a newer call is under way
    parts.message.textContent = notice(entry);
    const scroll = document.activeElement?.dataset?.axis;
    if (!stacks || !stacks.length) { parts.planes.replaceChildren(); return; }
    const panes = [];
    if (state.arm < 0) data.arms.forEach((_, a) => panes.push([0, a]));
    else [0, 1, 2].forEach((axis) => panes.push([axis, state.arm]));
    const usable = panes.filter(([axis]) => available(entry.pictures, axis).length);
    parts.planes.replaceChildren(...usable.map(([axis, a]) => pane(entry.pictures, stacks, axis, a, usable.length)));
    if (scroll !== undefined) parts.planes.querySelector(`input[data-axis="${scroll}"]`)?.focus();
  }
  function notice(entry) {
    if (!entry.pictures) return entry.note || "No picture of this case is embedded.";
    const { channels, stacks } = entry.pictures;
    const notes = [];
    if (channels > 1) notes.push(`Channel 0 of ${channels} is shown.`);
    if (!stacks.some((stack) => stack.whole))
      notes.push(`Only planes through objects and predictions are embedded` +
        (entry.left_out ? `; ${entry.left_out} did not fit into the page.` : "."));
    if (stacks.some((stack) => stack.image.startsWith("data:image/jpeg")))
      notes.push("Pictures are JPEG-compressed and at most 320 pixels wide.");
    return notes.join(" ");
  }

  function pane(pictures, stacks, axis, a, total) {
    const { name, rows, columns, flip } = AXES[axis];
    const values = available(pictures, axis);
    const index = nearest(values, state.at[axis]);
    const size = [pictures.shape[rows], pictures.shape[columns]];
    const step = [pictures.spacing[rows], pictures.spacing[columns]];
    const room = parts.planes.clientWidth || 1000;
    const widest = state.arm < 0 ? room / total - 18 : axis === 0 ? room * 0.42 : room * 0.27;
    const scale = Math.min(Math.max(widest, 240) / (size[1] * step[1]),
      (state.arm < 0 || axis === 0 ? 560 : 430) / (size[0] * step[0])); // screen pixels per mm
    const width = size[1] * step[1] * scale, height = size[0] * step[0] * scale;
    const stage = element("div", { className: "stage" });
    stage.style.width = `${width}px`;
    stage.style.height = `${height}px`;
    const plane = planeOf(pictures, stacks, axis, index);
    const canvas = paint(plane, pictures, flip);
    canvas.className = state.smooth ? "" : "crisp";
    const arm = data.arms[a];
    canvas.setAttribute("aria-label", `${name}, slice ${index + 1} of ${pictures.shape[axis]}`);
    stage.append(canvas);
    const overlay = shape("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, stage);
    const px = { x: (v) => v * step[1] * scale,
      y: (v) => (flip ? size[0] - v : v) * step[0] * scale, width, height };
    if (state.arm >= 0) drawGuides(overlay, px, axis);
    drawBoxes(overlay, px, a, axis, index);
    overlay.addEventListener("click", (event) => {
      const at = [...state.at];
      const frame = overlay.getBoundingClientRect();
      const y = (event.clientY - frame.top) / frame.height, x = (event.clientX - frame.left) / frame.width;
      at[rows] = clamp(Math.floor((flip ? 1 - y : y) * size[0]), 0, size[0] - 1);
      at[columns] = clamp(Math.floor(x * size[1]), 0, size[1] - 1);
      update({ at });
    });
    const slider = element("input", { type: "range", min: 0, max: values.length - 1,
      value: values.indexOf(index), disabled: values.length < 2, ariaLabel: `slice of the ${name}` });
    slider.dataset.axis = axis;
    slider.addEventListener("input", () => {
      const at = [...state.at];
      at[axis] = values[slider.value];
      update({ at });
    });
    const title = state.arm < 0 ? `${arm.name}: ${name}` : name;
    return element("figure", { className: "plane" }, element("figcaption", {},
      element("span", { textContent: title }),
      element("span", { className: "soft", textContent: `slice ${index} of 0 to ${pictures.shape[axis] - 1}` +
        (index === clamp(state.at[axis], 0, pictures.shape[axis] - 1) ? "" : ", the nearest stored") })),
      stage, slider);
  }

  function paint(plane, pictures, flip) {
    const canvas = element("canvas", { width: plane.width, height: plane.height });
    const context = canvas.getContext("2d");
    const output = context.createImageData(plane.width, plane.height);
    const [low, high] = state.window ?? pictures.window;
    const gain = 255 / Math.max(1, high - low);
    for (let row = 0; row < plane.height; row += 1)
      for (let column = 0; column < plane.width; column += 1) {
        const grey = (plane.read(flip ? plane.height - 1 - row : row, column) - low) * gain;
        const at = 4 * (row * plane.width + column);
        output.data[at] = output.data[at + 1] = output.data[at + 2] = grey;
        output.data[at + 3] = 255;
      }
    context.putImageData(output, 0, 0);
    return canvas;
  }

  function drawGuides(overlay, px, axis) {
    const { rows, columns } = AXES[axis];
    const x = px.x(state.at[columns] + 0.5), y = px.y(state.at[rows] + 0.5);
    for (const d of [`M${x} 0v9M${x} ${px.height}v-9`, `M0 ${y}h9M${px.width} ${y}h-9`])
      shape("path", { d, class: "guide", style: "stroke-opacity:.8;stroke-width:1.5" }, overlay);
  }

  function drawBoxes(overlay, px, a, axis, index) {
    const { rows, columns } = AXES[axis];
    const labels = [];
    const own = findingsOf(state.case).filter((f) => f.arm === a && !f.hidden && f.match !== -2 &&
      f.box[axis] < index + 1 && f.box[axis + 3] > index);
    own.sort((p, q) => (p.kind === "truth") - (q.kind === "truth"));
    for (const finding of own) {
      const left = px.x(finding.box[columns]), right = px.x(finding.box[columns + 3]);
      const ys = [px.y(finding.box[rows]), px.y(finding.box[rows + 3])];
      const top = Math.min(...ys), bottom = Math.max(...ys);
      const truth = finding.kind === "truth";
      const kind = truth ? (finding.missed ? "missed" : "truth") : finding.match >= 0 ? "hit" : "false";
      const stroke = kind === "missed" ? 3.5 : 2;
      const box = { x: left, y: top, width: right - left, height: bottom - top };
      shape("rect", { ...box, class: "halo", "stroke-width": stroke + 2 }, overlay);
      shape("rect", { ...box, class: kind, "stroke-width": stroke }, overlay);
      if (isFocus(finding))
        shape("rect", { x: left - 5, y: top - 5, width: right - left + 10, height: bottom - top + 10,
          class: "focus" }, overlay);
      if (kind === "false") {
        const d = `M${right - 9} ${top}L${right} ${top + 9}M${right} ${top}L${right - 9} ${top + 9}`;
        shape("path", { d, class: "cross false", "stroke-width": 2, style: "stroke-dasharray:none" }, overlay);
      }
      const name = className(finding.label);
      const text = truth ? (finding.missed ? `MISSED ${name}` : name)
        : `${kind === "false" ? "FALSE " : ""}${finding.score.toPrecision(2)} ${name}`;
      labels.push({ kind, text, left, y: truth ? top - 6 : bottom + 14 });
    }
    placeLabels(overlay, px, labels);
  }
  function placeLabels(overlay, px, labels) { // pushed apart, kept inside the picture
    const taken = [];
    for (const label of labels.reverse()) {
      const node = shape("text", { class: label.kind, x: 0, y: 0 }, overlay);
      node.textContent = label.text;
      const long = (node.getComputedTextLength() || label.text.length * 7.8) + 4; // 0 before it is shown
      const x = clamp(label.left, 2, Math.max(2, px.width - long));
      let y = clamp(label.y, 12, px.height - 4);
      for (let tries = 0; tries < 12; tries += 1) {
        const clash = taken.find((t) => Math.abs(t.y - y) < 13 && x < t.x + t.long && t.x < x + long);
        if (!clash) break;
        y = label.y <= 12 || label.kind === "hit" || label.kind === "false" ? clash.y + 14 : clash.y - 14;
        if (y < 12 || y > px.height - 4) y = clamp(y, 12, px.height - 4);
      }
      taken.push({ x, y, long });
      node.setAttribute("x", x);
      node.setAttribute("y", y);
    }
  }

  setUp();
  if (!readHash()) showCase(worstCase());
  touched = true;
  const closed = () => [...document.querySelectorAll("details:not([open])")];
  window.addEventListener("beforeprint", () => closed().forEach((d) => { d.open = true; d.dataset.printed = 1; }));
  window.addEventListener("afterprint", () =>
    document.querySelectorAll("details[data-printed]").forEach((d) => { d.open = false; }));
})();
