"use strict";
// Draws the charts of a page of `fgpt report RUN ...` from the JSON in it; nothing is loaded.
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const AXES = { step: "optimizer step", tokens: "tokens", hours: "hours of steps" };
  const LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 34;
  const state = Object.assign({ axis: "step", smoothing: 0, hidden: [] }, restored());

  // a page that is renewed while a run goes on keeps what was chosen
  function restored() {
    try { return JSON.parse(sessionStorage.getItem("fgpt-report")) || {}; } catch { return {}; }
  }
  function keep() {
    try { sessionStorage.setItem("fgpt-report", JSON.stringify(state)); } catch { /* not offered */ }
  }

  function element(name, attributes, parent, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e12) return trim(value / 1e12) + "T";
    if (size >= 1e9) return trim(value / 1e9) + "B";
    if (size >= 1e6) return trim(value / 1e6) + "M";
    if (size >= 1e4) return trim(value / 1e3) + "k";
    if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    return trim(value);
  }
  function trim(value) { return String(Number(value.toPrecision(4))); }

  // the mean of a point and those before it, the older the less; as in TensorBoard, without bias
  function smoothed(values) {
    const keepShare = state.smoothing;
    if (keepShare === 0) return values;
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = keepShare * mean + (1 - keepShare) * value;
      weight = keepShare * weight + (1 - keepShare);
      return mean / weight;
    });
  }

  // the lines of a chart: of each visible run and series, points [x, y]
  function linesOf(chart) {
    const lines = [];
    runs.forEach((run, i) => {
      if (state.hidden.includes(run.name)) return;
      for (const key of chart.series) {
        const series = run.series[key];
        if (!series) continue;
        const isMeasured = series.measured === true;  // not a value for each step
        const raw = series.y;
        const values = isMeasured ? raw : smoothed(raw);
        const x = series.x[state.axis];
        const points = values.map((y, j) => [x[j], y]);
        lines.push({
          run: run.name, color: `var(--c${i % 8})`, isMeasured,
          label: chart.series.length > 1 ? (isMeasured ? "validation" : "training") : "",
          points: points.filter(([, y]) => y !== null && (!chart.log || y > 0)),
          faint: !isMeasured && state.smoothing > 0 ? raw.map((y, j) => [x[j], y]) : [],
        });
      }
    });
    return lines.filter((line) => line.points.length);
  }

  function ticks(low, high, count) {
    const step = 10 ** Math.floor(Math.log10((high - low) / count));
    const size = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= count);
    const found = [];
    for (let i = Math.ceil(low / size); i * size <= high + size * 1e-9; i++) found.push(i * size);
    return found;
  }

  // 1, 2, 5, 10, ... between two powers of ten; only 1, 10, ... where that is too many
  function logTicks(low, high, count) {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const m of [1, 2, 5]) found.push(m * 10 ** power);
    }
    const inside = found.filter((y) => Math.log10(y) >= low && Math.log10(y) <= high);
    const powers = inside.filter((y) => Number.isInteger(Math.log10(y)));
    return inside.length <= 2 * count ? inside : powers;
  }

  function draw(chart, figure) {
    const svg = figure.querySelector("svg"), values = figure.querySelector(".values");
    svg.replaceChildren();
    values.hidden = true;
    const lines = linesOf(chart);
    const width = svg.clientWidth || 600, height = figure.className === "large" ? 340 : 210;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    if (!lines.length) {
      element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, svg, "no data");
      return;
    }
    // 1. scales
    const scale = chart.log ? Math.log10 : (y) => y;
    const xs = lines.flatMap((line) => [line.points[0][0], line.points.at(-1)[0]]);
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    let low = Infinity, high = -Infinity;
    for (const line of lines) for (const [, y] of line.points) {
      low = Math.min(low, scale(y)); high = Math.max(high, scale(y));
    }
    if (chart.zero) low = Math.min(low, 0);
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    [low, high] = [chart.zero && low === 0 ? 0 : low - margin, high + margin];
    const px = (x) => LEFT + (x - left) / (right - left) * (width - LEFT - RIGHT);
    const py = (y) => height - BOTTOM - (scale(y) - low) / (high - low) * (height - TOP - BOTTOM);
    // 2. grid and labels
    for (const x of ticks(left, right, Math.max(2, Math.floor(width / 110)))) {
      element("text", { x: px(x), y: height - 18, "text-anchor": "middle" }, svg, short(x));
    }
    const count = Math.max(2, Math.floor(height / 45));
    for (const y of chart.log ? logTicks(low, high, count) : ticks(low, high, count)) {
      element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }, svg);
      element("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, svg, short(y));
    }
    const place = { x: (LEFT + width - RIGHT) / 2, y: height - 3, "text-anchor": "middle" };
    element("text", place, svg, AXES[state.axis]);
    // 3. lines
    const path = (points) => points.filter(([, y]) => y !== null && (!chart.log || y > 0))
      .map(([x, y], j) => `${j ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    const clip = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: height - TOP - BOTTOM };
    const id = `clip-${chart.key}`;
    element("rect", clip, element("clipPath", { id }, svg));
    const plot = element("g", { "clip-path": `url(#${id})`, fill: "none" }, svg);
    for (const line of lines) {
      if (line.faint.length) {
        element("path", { d: path(line.faint), stroke: line.color, opacity: 0.25 }, plot);
      }
    }
    for (const line of lines) {
      const stroke = { d: path(line.points), stroke: line.color, "stroke-linejoin": "round" };
      element("path", { ...stroke, "stroke-width": line.isMeasured ? 2.5 : 1.4,
        opacity: chart.series.length > 1 && !line.isMeasured ? 0.6 : 1 }, plot);
      if (line.isMeasured || line.points.length === 1) for (const [x, y] of line.points) {
        element("circle", { cx: px(x), cy: py(y), r: 3, fill: line.color }, plot);
      }
    }
    // 4. the values under the pointer
    const cursor = element("line", { class: "cursor", y1: TOP, y2: height - BOTTOM }, svg);
    cursor.style.display = "none";
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect();
      const at = left + ((event.clientX - box.left) * width / box.width - LEFT)
        / (width - LEFT - RIGHT) * (right - left);
      if (at < left || at > right) { svg.onpointerleave(); return; }
      cursor.setAttribute("x1", px(at)); cursor.setAttribute("x2", px(at));
      cursor.style.display = "";
      values.replaceChildren(...lines.map((line) => row(line, nearest(line.points, at))));
      values.hidden = false;
    };
    svg.onpointerleave = () => { cursor.style.display = "none"; values.hidden = true; };
  }

  function nearest(points, x) {
    let begin = 0, end = points.length - 1;
    while (begin < end) {
      const middle = (begin + end) >> 1;
      if (points[middle][0] < x) begin = middle + 1; else end = middle;
    }
    const before = points[Math.max(0, begin - 1)];
    return Math.abs(before[0] - x) < Math.abs(points[begin][0] - x) ? before : points[begin];
  }

  function row(line, [x, y]) {
    const node = document.createElement("div"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = line.color;
    const name = [runs.length > 1 ? line.run : "", line.label].filter(Boolean).join(" ");
    node.append(swatch, `${name ? name + ": " : ""}${short(y)} at ${short(x)}`);
    return node;
  }

  const figures = charts.map((chart) => document.getElementById(`chart-${chart.key}`));
  const drawAll = () => charts.forEach((chart, i) => draw(chart, figures[i]));
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.checked = input.value === state.axis;
    input.onchange = () => { state.axis = input.value; keep(); drawAll(); };
  }
  const slider = document.getElementById("smoothing");
  slider.value = state.smoothing;
  slider.oninput = () => { state.smoothing = Number(slider.value); keep(); drawAll(); };
  for (const input of document.querySelectorAll("input[name=run]")) {
    input.checked = !state.hidden.includes(input.value);
    input.onchange = () => {
      state.hidden = state.hidden.filter((name) => name !== input.value);
      if (!input.checked) state.hidden.push(input.value);
      keep(); drawAll();
    };
  }
  new ResizeObserver(drawAll).observe(document.querySelector(".charts"));
  drawAll();
})();
