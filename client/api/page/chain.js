// Draws the chain that answers: its peers as a pipeline, what each does to a token, and what changes, as it changes.

const HUES = [18, 168, 222, 286, 44, 340, 198, 96]; // one for each peer, in the order in which they are seen first
const MOST_CELLS = 48; // blocks that can be told apart in a strip
const TALLEST = 8; // medians: a reroute may take a hundred times as long as a token, and would hide all others
const BEATS = 60; // tokens in the picture of the last ones
const LEAVING_MS = 2600; // a lost peer stays in sight for so long
const RATE_WINDOW_MS = 4000;
const TOGETHER_MS = 3; // what comes within this time came at once

/**
 * The chain, drawn into the page's `#chain`. Begin with `begin`, then `see` each chunk's trace and `beat` with each
 * piece of text; `end` stops the clocks.
 */
export class Chain {
  #seats = new Map(); // by "peer id blocks": the element of each hop in sight
  #hues = new Map(); // by peer id
  #names = new Map(); // by the end of a peer id, which is how the server's sentences name it
  #told = 0; // events of this answer that are in the list
  #reroutes = 0;
  #times = []; // of pieces of text, milliseconds
  #tokens = 0;
  #marks = new Set(); // beats before which the chain changed
  #trace = null; // the last one
  #beats = [];

  constructor(say) {
    this.say = say; // for those who hear the page
    this.root = document.getElementById("chain");
    this.list = document.getElementById("hops");
    this.events = document.getElementById("events");
    this.unfold = document.getElementById("unfold");
    this.unfold.addEventListener("click", () => {
      const isOpen = this.root.toggleAttribute("data-open");
      this.unfold.setAttribute("aria-expanded", String(isOpen));
    });
  }

  /** A question was asked. The chain of the last answer stays until another is known. */
  begin() {
    this.#told = this.#reroutes = this.#tokens = 0;
    this.#times = [];
    this.#beats = [];
    this.#marks.clear();
    this.events.replaceChildren();
    this.root.dataset.phase = "asking";
    this.#trace = null;
    this.#hint("Choosing peers…");
    this.#drawBeats();
    document.getElementById("rate").hidden = true;
  }

  /** What the last answer of an earlier visit was made by. */
  recall(trace) {
    if (trace) this.#seat(trace.chain.map(asHop), trace.n_blocks);
  }

  /** What the server says of the chain: {chain, reroutes, events, n_blocks?}. */
  see(trace) {
    if (!trace || !Array.isArray(trace.chain)) return;
    this.#trace = trace;
    this.root.dataset.phase = "answering";
    if ((trace.reroutes ?? 0) > this.#reroutes) {
      this.#reroutes = trace.reroutes;
      this.#marks.add(this.#beats.length);
    }
    this.#seat(trace.chain.map(asHop), trace.n_blocks);
    const news = (trace.events ?? []).slice(this.#told);
    this.#told += news.length;
    for (const text of news) this.#tell(String(text));
  }

  /** Another piece of the answer came; with it there are so many tokens, where the server says so. */
  beat(total) {
    const tokens = Math.max(1, (total ?? 0) - this.#tokens);
    const now = performance.now();
    const passed = now - (this.#times.at(-1) ?? now);
    if (passed > TOGETHER_MS) this.#beats.push({ ms: passed, tokens });
    else if (this.#beats.length) this.#beats.at(-1).tokens += tokens; // one step brought several
    this.#times.push(now);
    this.#tokens += tokens;
    this.#drawBeats();
    const lately = this.#times.filter((time) => now - time <= RATE_WINDOW_MS);
    const seconds = (now - lately[0]) / 1000;
    if (lately.length > 3) this.#showRate(((lately.length - 1) * (this.#tokens / this.#times.length)) / seconds);
  }

  /** The answer is over. Returns what to remember of it. */
  end(tokens = 0) {
    this.root.dataset.phase = "idle";
    this.#hint("Ask something: the peers that answer will be drawn here.");
    for (const [place, seat] of this.#seats) if (seat.dataset.state !== "answers") this.#leave(place, seat);
    const seconds = this.#times.length > 1 ? (this.#times.at(-1) - this.#times[0]) / 1000 : 0;
    const counted = tokens || this.#tokens;
    const perSecond = seconds > 0 && counted > 1 ? (counted - 1) / seconds : 0;
    if (perSecond) this.#showRate(perSecond);
    return {
      tokens: counted,
      perSecond,
      peers: [...this.#seats.values()].filter((seat) => seat.dataset.state === "answers").length,
      reroutes: this.#reroutes,
      trace: this.#trace,
    };
  }

  // ---------------------------------------------------------------- the pipeline

  #seat(hops, nBlocks) {
    const shown = withGaps(hops, nBlocks);
    const slowest = Math.max(1e-9, ...hops.map((hop) => hop.ms ?? 0));
    const total = nBlocks || Math.max(1, ...hops.map((hop) => hop.stop));
    const wanted = new Set(shown.map(placeOf));
    for (const [place, seat] of this.#seats) {
      if (wanted.has(place)) continue;
      if (seat.dataset.state === "gap") this.#remove(place, seat);
      else if (seat.dataset.state === "answers") this.#lose(place, seat);
    }
    for (const hop of shown) {
      const place = placeOf(hop);
      let seat = this.#seats.get(place);
      if (!seat) {
        seat = this.#newSeat(hop, total);
        this.#seats.set(place, seat);
      }
      clearTimeout(seat.timer); // it may be back
      seat.dataset.state = hop.isGap ? "gap" : "answers";
      this.#fill(seat, hop, slowest);
    }
    this.#order();
    this.#hint("Choosing peers…");
    document.getElementById("key").hidden = !hops.some((hop) => hop.parts);
  }

  /** By blocks; who was lost stands before who is there instead. */
  #order() {
    const rank = (seat) => [seat.start, seat.dataset.state === "answers" ? 2 : seat.dataset.state === "gap" ? 1 : 0];
    const wanted = [...this.#seats.values()].sort((a, b) => rank(a)[0] - rank(b)[0] || rank(a)[1] - rank(b)[1]);
    let next = this.list.firstElementChild; // who stays in place is not touched: it would seem to arrive once more
    for (const seat of wanted) {
      if (seat === next) next = next.nextElementSibling;
      else this.list.insertBefore(seat, next);
    }
    for (const ghost of this.list.querySelectorAll(".ghost")) ghost.remove();
  }

  #newSeat(hop, total) {
    const seat = element("li", "hop");
    seat.start = hop.start;
    const strip = element("span", "strip");
    const part = element("i");
    strip.append(part);
    seat.style.setProperty("--from", `${(100 * hop.start) / total}%`);
    seat.style.setProperty("--wide", `${(100 * (hop.stop - hop.start)) / total}%`);
    seat.style.setProperty("--cells", String(total));
    strip.classList.toggle("cells", total <= MOST_CELLS);
    seat.style.setProperty("--share", String(hop.stop - hop.start));
    if (!hop.isGap) {
      seat.style.setProperty("--hue", String(this.#hue(hop.peerId)));
      this.#names.set(hop.peerId.slice(-8), hop.name);
    }
    const card = element("div", "card");
    const name = element("span", "name", hop.isGap ? "looking for a peer" : hop.name);
    name.title = hop.peerId;
    const blocks = element("span", "blocks");
    blocks.append(element("span", "word", "blocks "), `${hop.start}:${hop.stop}`);
    const bar = element("div", "bar-of-ms");
    bar.append(element("i", "compute"), element("i", "queue"), element("i", "network"));
    card.append(name, element("span", "ms"), blocks, element("span", "how"), strip, bar);
    seat.append(element("span", "dot"), card);
    return seat;
  }

  #fill(seat, hop, slowest) {
    const set = (name, text) => {
      const target = seat.querySelector(name);
      if (target.textContent !== text) target.textContent = text;
    };
    set(".ms", hop.ms === null ? "" : `${shown(hop.ms)} ms`);
    set(".how", hop.relayed ? "relayed by this server" : "");
    const parts = hop.parts ?? { compute: hop.ms ?? 0, queue: 0, network: 0 };
    for (const [name, ms] of Object.entries(parts)) {
      seat.style.setProperty(`--${name}`, `${Math.max(0, Math.min(100, (100 * ms) / slowest))}%`);
    }
    const detail = Object.entries(parts).map(([name, ms]) => `${name} ${shown(ms)} ms`);
    seat.querySelector(".bar-of-ms").title = hop.parts ? detail.join(", ") : "";
  }

  #lose(place, seat) {
    seat.dataset.state = "lost";
    seat.querySelector(".ms").textContent = "lost";
    seat.timer = setTimeout(() => this.#leave(place, seat), LEAVING_MS);
  }

  #leave(place, seat) {
    clearTimeout(seat.timer);
    if (seat.dataset.state === "gap" || matchMedia("(prefers-reduced-motion: reduce)").matches) {
      this.#remove(place, seat);
      return;
    }
    seat.dataset.state = "leaving";
    seat.timer = setTimeout(() => this.#remove(place, seat), 400);
  }

  #remove(place, seat) {
    clearTimeout(seat.timer);
    if (this.#seats.get(place) === seat) this.#seats.delete(place);
    seat.remove();
  }

  #hue(peerId) {
    if (!this.#hues.has(peerId)) this.#hues.set(peerId, HUES[this.#hues.size % HUES.length]);
    return this.#hues.get(peerId);
  }

  /** What stands where no chain is drawn. */
  #hint(text) {
    document.getElementById("chain-hint").textContent = this.#seats.size ? "" : text;
  }

  // ---------------------------------------------------------------- what changed, and how fast it goes

  #tell(said) {
    const text = said
      .replace(/\bpeer (\S{8}) \(/g, (whole, end) => (this.#names.has(end) ? `${this.#names.get(end)} (` : whole))
      .replaceAll(" -> ", " → ");
    const item = element("li");
    const time = element("time", "", new Date().toLocaleTimeString([], { hour12: false }));
    item.append(time, element("span", "", text));
    this.events.prepend(item);
    this.root.dataset.news = String(this.#told);
    this.say(text);
  }

  #showRate(perSecond) {
    document.getElementById("rate").hidden = false;
    document.getElementById("rate-value").textContent = perSecond < 10 ? perSecond.toFixed(1) : perSecond.toFixed(0);
  }

  #drawBeats() {
    const beats = this.#beats.slice(-BEATS).map(({ ms, tokens }) => ms / tokens);
    const first = this.#beats.length - beats.length;
    document.getElementById("beat").hidden = beats.length < 4;
    if (beats.length < 4) return;
    const sorted = [...beats].sort((a, b) => a - b);
    const median = sorted[sorted.length >> 1];
    const tallest = Math.min(sorted.at(-1), TALLEST * median);
    const width = 240 / BEATS;
    const bars = beats.map((ms, i) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = Math.max(1.5, 38 * Math.min(1, ms / tallest));
      const at = { x: i * width + 0.5, y: 40 - height, width: width - 1, height, rx: 0.8 };
      for (const [name, value] of Object.entries(at)) bar.setAttribute(name, value.toFixed(2));
      if (this.#marks.has(first + i)) bar.setAttribute("class", "reroute");
      return bar;
    });
    document.getElementById("beats").replaceChildren(...bars);
    const reroutes = this.#reroutes ? `, ${this.#reroutes} ${this.#reroutes === 1 ? "reroute" : "reroutes"}` : "";
    document.getElementById("beat-text").textContent =
      `${shown(median)} ms per token, ${shown(sorted.at(-1))} at most${reroutes}`;
  }
}

function asHop(said) {
  const [start, stop] = String(said.blocks).split(":").map(Number);
  const isMeasured = typeof said.ms === "number";
  const parts = { compute: said.compute_ms, queue: said.queue_ms, network: said.network_ms };
  const areKnown = Object.values(parts).every((ms) => typeof ms === "number");
  return {
    peerId: String(said.peer_id),
    name: String(said.name || said.peer_id),
    start,
    stop,
    ms: isMeasured ? said.ms : null,
    parts: isMeasured && areKnown ? parts : null,
    relayed: Boolean(said.relayed),
    isGap: false,
  };
}

/** The hops, and between them what no peer has at the moment. */
function withGaps(hops, nBlocks) {
  const found = [];
  let next = 0;
  const gap = (start, stop) => ({ peerId: "", name: "", start, stop, ms: null, parts: null, relayed: false, isGap: true });
  for (const hop of hops) {
    if (hop.start > next) found.push(gap(next, hop.start));
    found.push(hop);
    next = Math.max(next, hop.stop);
  }
  if (nBlocks && next < nBlocks && hops.length) found.push(gap(next, nBlocks));
  return found;
}

function placeOf(hop) {
  return `${hop.peerId} ${hop.start}:${hop.stop}`;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function shown(ms) {
  return ms < 10 ? ms.toFixed(1) : ms.toFixed(0);
}
