// The interactive charts: loss over training, and quality against cost. uPlot draws; hover, zoom by dragging,
// and the legend's toggles are uPlot's own.
const CHARTS = JSON.parse(document.getElementById("charts").textContent);
const nats = (arm, loss) => loss;
const Y = {
  loss: ["loss (nats per token)", nats],
  perplexity: ["perplexity", (arm, loss) => Math.exp(loss)],
  bits: ["bits per byte of validation text", (arm, loss) => (arm.bits === null ? null : loss * arm.bits)],
};
const X = {
  step: ["step", (curve) => curve.step],
  tokens: ["tokens", (curve) => curve.tokens],
  seconds: ["seconds of training steps", (curve) => curve.step_seconds && curve.step.map((step) => step * curve.step_seconds)],
  flops: ["training FLOPs", (curve) => curve.flops_per_token && curve.tokens?.map((tokens) => tokens * curve.flops_per_token)],
};
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const shown = (value) => (value === null || value === undefined ? "–" : short.format(value));
const ticks = (plot, values) => values.map((value) => (Math.abs(value) < 1e4 ? short : compact).format(value));
const colour = (arm) => (arm.colour === "black" ? css("--ink") : arm.colour);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Each arm as [x, y, low, high], ready for uPlot; an arm without these quantities has no points.
function curvesOf(data, { split, x, y }) {
  const baseline = new Map();
  const first = data.arms[0].curves[split];
  first?.step.forEach((step, place) => baseline.set(step, first.loss[place]));
  return data.arms.map((arm) => {
    const curve = arm.curves[split];
    const xs = curve && X[x][1](curve);
    if (!xs) return [[], []];
    const value = (loss, place) => {
      if (loss === null) return null;
      if (y !== "difference") return Y[y][1](arm, loss);
      const other = baseline.get(curve.step[place]);
      return other === undefined || other === null ? null : loss - other;
    };
    return [xs, curve.loss.map(value)];
  });
}

function costsOf(data, { x, y }) {
  return data.arms.map((arm) => {
    if (arm.costs[x] === null) return [[], []];
    const of = (loss) => Y[y][1](arm, loss);
    return [[arm.costs[x]], [of(arm.loss)], arm.interval?.map(of)];
  });
}

// The place of the nearest point of an arm: arms have points at different x.
function nearest(plot, series, place, x) {
  const [xs, ys] = [plot.data[0], plot.data[series]];
  let [left, right] = [place, place];
  while (left >= 0 && ys[left] == null) left -= 1;
  while (right < ys.length && ys[right] == null) right += 1;
  if (left < 0) return right < ys.length ? right : place;
  if (right >= ys.length) return left;
  return x - xs[left] <= xs[right] - x ? left : right;
}

// How far a point is from the cursor, in both directions.
function distance(plot, series, at, y, cursor) {
  return Math.hypot(plot.valToPos(plot.data[0][at], "x") - plot.cursor.left, y - cursor);
}

// The 95% intervals of quality, drawn behind the points.
function drawIntervals(plot, arms) {
  plot.ctx.save();
  arms.forEach(([xs, , interval], place) => {
    if (!interval || interval[0] === null || !plot.series[place + 1].show) return;
    const [x, low, high] = [plot.valToPos(xs[0], "x", true), ...interval.map((end) => plot.valToPos(end, "y", true))];
    plot.ctx.strokeStyle = plot.series[place + 1].stroke(plot, place + 1);
    plot.ctx.lineWidth = 1.5 * devicePixelRatio;
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, low);
    plot.ctx.lineTo(x, high);
    plot.ctx.stroke();
  });
  plot.ctx.restore();
}

function optionsOf(data, arms, points, titles, hidden, width) {
  const axis = { stroke: css("--ink"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, values: ticks };
  const wider = (low, high) => {
    const margin = 0.05 * (high - low || Math.abs(high) || 1);
    return [low - margin, high + margin];
  };
  const range = (plot, low, high) => {
    if (low === null) return [0, 1];
    const ends = arms.flatMap(([, , interval], place) => (plot.series[place + 1].show && interval ? interval : []));
    return wider(Math.min(low, ...ends), Math.max(high, ...ends));
  };
  const series = data.arms.map((arm, place) => ({
    label: arm.name,
    show: !hidden.has(place),
    stroke: colour(arm),
    width: place === 0 ? 2.5 : 1.5,
    dash: arm.dash,
    spanGaps: true,
    paths: points ? () => null : undefined,
    points: points ? { show: true, size: 9, fill: colour(arm) } : { show: arms[place][0].length < 13, size: 5 },
    value: (plot, value) => shown(value),
  }));
  return {
    width,
    height: Math.max(260, Math.min(440, Math.round(width * 0.55))),
    scales: { x: { time: false, range: (plot, low, high) => (points && low !== null ? wider(low, high) : [low, high]) }, y: { range } },
    axes: [{ ...axis, label: titles[0], labelSize: 24 }, { ...axis, label: titles[1], size: 60, labelSize: 24 }],
    series: [{ label: titles[0], value: (plot, value) => shown(value) }, ...series],
    cursor: { focus: points ? { prox: 24, dist: distance } : { prox: 24 }, dataIdx: (plot, series, place, x) => (series ? nearest(plot, series, place, x) : place) },
    focus: { alpha: 0.25 },
    hooks: points ? { draw: [(plot) => drawIntervals(plot, arms)] } : {},
  };
}

function makeChart(figure) {
  const data = CHARTS[figure.dataset.section];
  const points = figure.dataset.chart === "costs";
  const [box, output] = [figure.querySelector(".plot"), figure.querySelector("output")];
  const menus = [...figure.querySelectorAll("select")];
  const hidden = new Set();
  let [plot, arms] = [null, []];
  const draw = () => {
    const chosen = Object.fromEntries(menus.map((menu) => [menu.dataset.of, menu.value]));
    arms = points ? costsOf(data, chosen) : curvesOf(data, chosen);
    const titles = ["x", "y"].map((of) => menus.find((menu) => menu.dataset.of === of).selectedOptions[0].textContent);
    const options = optionsOf(data, arms, points, titles, hidden, box.clientWidth);
    options.hooks.setSeries = [(own, place, change) => {
      if (place && "show" in change) hidden[change.show ? "delete" : "add"](place - 1);
      const arm = change.focus && place ? data.arms[place - 1] : null;
      const at = arm && own.cursor.idxs[place];
      output.textContent = arm && at != null ? `${arm.name}: ${shown(own.data[place][at])} at ${shown(own.data[0][at])}` : "";
    }];
    plot?.destroy();
    const any = arms.some(([xs, ys]) => ys.some((value) => value !== null));
    box.replaceChildren();
    plot = any ? new uPlot(options, uPlot.join(arms.map(([xs, ys]) => [xs, ys])), box) : null;
    if (!any) box.textContent = "Not measured.";
    figure.chart = plot;
  };
  menus.forEach((menu) => menu.addEventListener("change", draw));
  figure.querySelectorAll("[data-show]").forEach((button) => button.addEventListener("click", () => {
    hidden.clear();
    if (button.dataset.show === "none") data.arms.forEach((arm, place) => place && hidden.add(place));
    draw();
  }));
  new ResizeObserver(() => {
    if (plot && box.clientWidth && box.clientWidth !== plot.width) draw();
  }).observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

document.querySelectorAll(".chart").forEach(makeChart);
