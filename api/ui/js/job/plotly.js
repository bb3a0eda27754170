// Loads plotly when a page needs it, and gives its plots the UI's colours, manners and size.

let loading = null;

/** Load plotly once; rejects when it cannot be loaded. */
export function loadPlotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "vendor/plotly.min.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      loading = null;
      script.remove();
      reject(new Error("The plots' library cannot be loaded."));
    };
    document.head.append(script);
  });
  return loading;
}

/** The value of a CSS custom property. */
export function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Text for plotly, which reads a little HTML in labels: markup is shown as it is. */
export function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const CONFIG = {
  displaylogo: false,
  responsive: false, // a ResizeObserver does it: plots also change size with the theme of the page around them
  scrollZoom: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toggleSpikelines"],
  toImageButtonOptions: { format: "svg" },
};

/** Layout that all plots share. */
export function baseLayout() {
  const text = token("--text-2");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Liberation Sans, Arial, sans-serif", size: 12, color: text },
    margin: { l: 56, r: 16, t: touch ? 44 : 14, b: 44 }, // on touch screens the buttons always show
    showlegend: false,
    hovermode: "closest",
    // On a touch screen a drag must scroll the page.
    dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: token("--surface-3"), bordercolor: token("--border-strong"), font: { color: token("--text"), size: 12 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: text, activecolor: token("--accent") },
  };
}

/** An axis in the UI's colours. */
export function axis(title) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: token("--plot-grid"),
    zeroline: false,
    linecolor: token("--border-strong"),
    ticks: "outside",
    ticklen: 4,
    tickcolor: token("--border-strong"),
    automargin: true,
  };
}

/**
 * Make a function that draws `figure()` = { data, layout } into `node` and keeps it in size and theme until the page
 * is left. Drawings never overlap.
 */
export function drawing(node, page, figure, onClick) {
  let drawn = false;
  let busy = false;
  let again = false;
  const draw = async () => {
    const plotly = await loadPlotly();
    if (page.signal.aborted) return;
    const { data, layout } = figure();
    await plotly.react(node, data, layout, CONFIG);
    if (drawn) return;
    drawn = true;
    if (onClick) node.on("plotly_click", (event) => onClick(event.points[0]));
    const resize = new ResizeObserver(() => {
      if (node.offsetWidth) void plotly.Plots.resize(node);
    });
    resize.observe(node);
    page.signal.addEventListener("abort", () => {
      resize.disconnect();
      plotly.purge(node);
    });
  };
  const update = async () => {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again && !page.signal.aborted) {
        again = false;
        await draw();
      }
    } catch (error) {
      node.textContent = error.message;
    } finally {
      busy = false;
    }
  };
  document.addEventListener("themechange", update, { signal: page.signal });
  return update;
}
