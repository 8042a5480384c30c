const root = document.documentElement;
const style = getComputedStyle(root);
const figures = JSON.parse(document.getElementById("figures").textContent);
const isTouchScreen = matchMedia("(pointer: coarse)").matches;
const config = {
  displaylogo: false,
  responsive: true,
  showSendToCloud: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

// Replaces the names of CSS variables by their values in the current colour scheme.
function withColors(value) {
  if (Array.isArray(value)) return value.map(withColors);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, withColors(inner)]));
  return typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
}

// The hover text of each heatmap cell, from the labels of its column and row.
for (const { data } of Object.values(figures))
  for (const trace of data)
    if (trace.meta) {
      const [columns, rows] = trace.meta;
      trace.text = rows.map(row => columns.map(column => column + "<br>" + row));
    }

function draw(width) {
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout } = withColors(figure);
    Plotly.react(id, data, { ...layout, width, dragmode: isTouchScreen ? false : "zoom" }, config);
  }
}

// plotly.js is in the page, compressed.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

// Draws the figures now, and again when the colours or the medium change.
function follow() {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    draw(680);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    draw();
    Object.keys(figures).forEach(Plotly.Plots.resize);
  });
}

function explain(error) {
  console.error(error);
  for (const id of Object.keys(figures))
    document.getElementById(id).textContent = `The figures need a browser from 2023 or newer (${error}).`;
}

loadPlotly().then(follow).catch(explain);
