// The page is whole without this file. It adds: news as they come, charts, and a button that copies the command.
"use strict";

const main = document.getElementById("main");
const line = document.getElementById("line");
const told = document.getElementById("told"); // read out by screen readers, when the state of the swarm changes
const CHARTS_EVERY_MS = 60_000;
const RETRY_MS = 3_000;
const REDRAW_MS = 1_500; // after the state of the swarm changed: the history is written by then

// ---------------------------------------------------------------- news

/** Puts in what the server made, section by section, and only where something changed: focus and charts stay. */
function show(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const sections = [...fresh.body.children];
  const wanted = new Set(sections.map((section) => section.id));
  for (const old of [...main.children]) if (!wanted.has(old.id)) old.remove();
  let before = null;
  for (const section of sections) {
    const old = document.getElementById(section.id);
    if (old === null) {
      place(section, before);
      before = section;
      continue;
    }
    if (signature(old) !== signature(section)) {
      const focused = old.contains(document.activeElement) ? document.activeElement : null;
      const path = focused && pathOf(focused, old);
      const text = section.outerHTML;
      if (section.id === "sentence" && old.className !== section.className) {
        told.textContent = section.firstElementChild.textContent;
        setTimeout(draw, REDRAW_MS);
      }
      old.replaceWith(section);
      made.set(section, text);
      if (path) at(path, section)?.focus({ preventScroll: true });
      before = section;
    } else {
      before = old;
    }
  }
  enhance();
}

function place(section, before) {
  made.set(section, section.outerHTML);
  if (before) before.after(section);
  else main.prepend(section);
}

/** What the server sent for a section, before this script touched it. */
const made = new WeakMap();
function signature(section) {
  return made.get(section) ?? section.outerHTML;
}

function pathOf(element, root) {
  const path = [];
  for (let e = element; e !== root; e = e.parentElement) path.unshift([...e.parentElement.children].indexOf(e));
  return path;
}

function at(path, root) {
  return path.reduce((element, index) => element?.children[index], root);
}

function listen() {
  const source = new EventSource("/api/v1/live");
  source.onopen = () => say("live", "live");
  source.onmessage = (event) => {
    say("live", "live");
    show(event.data);
  };
  source.onerror = () => {
    say("no connection, trying again", "lost");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  };
}

function say(text, style) {
  if (line.textContent !== text) line.textContent = text;
  line.className = `line ${style}`;
}

// ---------------------------------------------------------------- the command

function enhance() {
  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard && copy.hidden) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 2000);
    });
  }
  const ranges = document.querySelector(".ranges");
  if (ranges && ranges.hidden) {
    ranges.hidden = false;
    for (const button of ranges.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.hours) === hours));
      button.addEventListener("click", () => {
        hours = Number(button.dataset.hours);
        for (const other of ranges.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
        draw();
      });
    }
    draw();
  }
}

// ---------------------------------------------------------------- charts

let hours = 24;
const plots = new Set();

const CHARTS = [
  { title: "Coverage", unit: "blocks served", series: [["blocks_served", "served"]], top: "n_blocks", whole: true },
  { title: "Peers", unit: "answering, of all", series: [["answering", "answering"], ["peers", "all"]], whole: true },
  { title: "Throughput", unit: "tokens/s free, of all", series: [["free_tokens_per_s", "free"], ["tokens_per_s", "all"]] },
];

async function draw() {
  for (const box of document.querySelectorAll(".charts")) {
    let data;
    try {
      const answer = await fetch(`/api/v1/history?model=${encodeURIComponent(box.dataset.model)}&hours=${hours}`);
      if (!answer.ok) continue;
      data = await answer.json();
    } catch {
      continue; // the line above says that there is no connection
    }
    for (const plot of [...plots]) {
      if (box.contains(plot.root) || !plot.root.isConnected) {
        plot.destroy();
        plots.delete(plot);
      }
    }
    box.replaceChildren(...CHARTS.map((chart) => frame(chart, box.dataset.name, data)));
    CHARTS.forEach((chart, index) => plots.add(paint(chart, box.children[index].lastElementChild, data)));
  }
}

/** A figure with a caption that says the latest numbers, for those who do not see the curve too. */
function frame(chart, name, data) {
  const figure = document.createElement("figure");
  figure.className = "chart";
  const caption = document.createElement("figcaption");
  const title = document.createElement("b");
  const several = document.querySelectorAll(".charts").length > 1;
  title.textContent = several ? `${chart.title}, ${name}` : chart.title;
  const now = document.createElement("span");
  const values = chart.series.map(([key]) => data[key].at(-1));
  now.textContent = ` ${chart.unit}: ${values.map((v) => number(v, chart)).join(" of ")}`;
  if (chart.top) now.textContent += ` of ${number(data[chart.top].at(-1), chart)}`;
  caption.append(title, now);
  const plot = document.createElement("div");
  plot.className = "plot";
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${title.textContent} over the last ${hours} hours;${now.textContent}`);
  figure.append(caption, plot);
  return figure;
}

function number(value, chart) {
  if (value === null || value === undefined) return "?";
  return chart.whole || value >= 10 ? String(Math.round(value)) : value.toPrecision(2);
}

function paint(chart, where, data) {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const keys = [...chart.series, ...(chart.top ? [[chart.top, "all"]] : [])];
  const peak = Math.max(1, ...keys.flatMap(([key]) => data[key].map((v) => v ?? 0)));
  const axis = {
    stroke: colour("--quiet"),
    grid: { stroke: colour("--grid-line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  const now = Date.now() / 1000;
  const clock = new Intl.DateTimeFormat(undefined, hours <= 24 ? { timeStyle: "short" } : { day: "numeric", month: "short" });
  const options = {
    width: where.clientWidth,
    height: 152,
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, y: false },
    scales: { x: { time: true, range: () => [now - hours * 3600, now] }, y: { range: () => [0, peak * 1.08] } },
    axes: [
      { ...axis, size: 28, space: 60, values: (_, times) => times.map((at) => clock.format(new Date(at * 1000))) },
      { ...axis, size: 38, ...(chart.whole ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] } : {}) },
    ],
    series: [
      {},
      ...keys.map(([, label], index) =>
        index === 0
          ? { label, stroke: colour("--chart-1"), fill: `${colour("--chart-1")}22`, width: 2, points: { show: false } }
          : { label, stroke: colour("--chart-2"), width: 1.5, dash: [5, 4], points: { show: false } },
      ),
    ],
  };
  return new uPlot(options, [data.at, ...keys.map(([key]) => data[key])], where);
}

for (const section of main.children) made.set(section, section.outerHTML);
say("connecting", "");
enhance();
listen();
setInterval(draw, CHARTS_EVERY_MS);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(draw, 200);
});
