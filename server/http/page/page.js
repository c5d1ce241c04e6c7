"use strict";
// Follows one group by the JSON answers of the master, and shows what an operator asks first.

const ADVICE = {
  ROUND_TIMEOUT: "These ranks are alive and did not contribute. Look at their logs: a branch that they did not take?",
  WORKER_LOST: "Their streams closed. Look at their logs, restart them, and resume at a new sequence.",
  DEADLOCK: "Every worker waits, on different rounds. The workers run their layers in orders that cannot meet.",
  LAYER_SPEC_MISMATCH: "The models differ. Use the same model on all ranks, changed at the same step.",
  LAYER_SET_MISMATCH: "The models have different layers. Use the same model on all ranks.",
  PAYLOAD_CHANGED: "A worker that restarted counts its rounds from 0. Call resume_at on all ranks.",
  NOT_FINITE: "A worker sent NaN or infinity. Look at its input and its learning rate, or declare the layer to propagate.",
  INVALID_CONTRIBUTION: "A worker sent numbers that no statistics can be. This is a fault of that worker's program.",
  TOO_FEW_WORKERS: "Fewer than min_workers contributed. Restart those that are missing.",
  GROUP_ENDED: "The group ended while this round was in flight.",
};
const HISTORY = 120;     // Columns of charts and strips.
const STRIP_ROWS = 64;   // Channels are combined into so many rows.
const PERIOD_MS = 1000;

const $ = (id) => document.getElementById(id);
const seconds = (duration) => (duration === undefined ? 0 : parseFloat(duration));
const number = (text) => (text === undefined ? 0 : Number(text));

function show(s) {
  if (!(s > 0)) return "0";
  if (s < 1e-3) return `${Math.round(s * 1e6)} µs`;
  if (s < 1) return `${(s * 1e3).toPrecision(3)} ms`;
  if (s < 120) return `${s.toPrecision(3)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

function element(tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;  // Screen readers hear changes alone.
}

const keyText = (key) =>
  `layer ${key.layer}, ${key.phase.replace("PHASE_", "").toLowerCase()} round ${key.sequence}`;
const rankText = (ranks, count) =>
  `rank${count === 1 ? "" : "s"} ${ranks.join(", ")}${count > ranks.length ? ` and ${count - ranks.length} more` : ""}`;

async function get(path, parameters) {
  const query = parameters ? `?${new URLSearchParams(parameters)}` : "";
  const response = await fetch(`/api/${path}${query}`, { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error((await response.text()).trim() || `HTTP ${response.status}`);
  return response.json();
}

// ---- What changed since the last look ------------------------------------------------------------------------------

const bucketsOf = (histogram) => (histogram && histogram.buckets ? histogram.buckets.map((b) => number(b.count)) : []);

// Estimates a quantile from counts by bucket, whose bounds grow by 2.5 from 100 us.
function quantile(counts, p) {
  const all = counts.reduce((a, b) => a + b, 0);
  let below = 0, lower = 0, upper = 1e-4;
  for (const count of counts) {
    if (count > 0 && below + count >= p * all) return lower + (upper - lower) * Math.max(0, (p * all - below) / count);
    below += count;
    lower = upper;
    upper *= 2.5;
  }
  return 0;
}

class Follower {
  constructor(job, group) {
    this.id = { job, group };
    this.latency = [];           // {p50, p99} of each second.
    this.base = null;            // Lateness and arrivals when the page was opened, by rank.
    this.counts = null;          // Buckets of round durations at the last look.
    this.layers = new Map();     // Name: {item, mean, var, columns}.
    this.completed = null;
    this.failed = null;
    this.at = 0;
  }

  // Returns the rounds per second, and notes the latency, since the last look.
  advance(answer) {
    const counts = [];
    for (const phase of answer.statistics.phases) {
      bucketsOf(phase.duration).forEach((count, i) => { counts[i] = (counts[i] || 0) + count; });
    }
    const now = performance.now();
    const completed = number(answer.summary.roundsCompleted);
    let rate = 0;
    if (this.counts !== null) {
      const fresh = counts.map((count, i) => count - (this.counts[i] || 0));
      const rounds = fresh.reduce((a, b) => a + b, 0);
      this.latency.push(rounds > 0 ? { p50: quantile(fresh, 0.5), p99: quantile(fresh, 0.99) } : null);
      if (this.latency.length > HISTORY) this.latency.shift();
      rate = (completed - this.completed) / ((now - this.at) / 1000);
    }
    this.counts = counts;
    this.completed = completed;
    this.at = now;
    return rate;
  }

  // Returns for each rank its lateness and how often it was last, since the page was opened.
  lateness(members) {
    const of = (m) => ({
      sum: seconds(m.lateness && m.lateness.sum), count: number(m.lateness && m.lateness.count),
      last: number(m.lastArrivals),
    });
    if (this.base === null) this.base = new Map(members.map((m) => [m.rank, of(m)]));
    return members.map((m) => {
      const now = of(m);
      let from = this.base.get(m.rank) || { sum: 0, count: 0, last: 0 };
      if (now.count === from.count) from = { sum: 0, count: 0, last: 0 };  // Nothing new: all of it.
      const count = now.count - from.count;
      return { member: m, rounds: count, mean: count > 0 ? (now.sum - from.sum) / count : 0,
               last: count > 0 ? (now.last - from.last) / count : 0 };
    });
  }
}

// ---- Drawing -------------------------------------------------------------------------------------------------------

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawLatency(canvas, history) {
  const context = canvas.getContext("2d");
  const ratio = devicePixelRatio || 1;  // Text keeps its size whatever the width of the page.
  const width = canvas.width = Math.round((canvas.clientWidth || 960) * ratio);
  const height = canvas.height = Math.round((canvas.clientHeight || 180) * ratio);
  const font = `${Math.round(13 * ratio)}px system-ui, sans-serif`;
  const known = history.filter((h) => h !== null);
  if (known.length === 0) {
    context.font = font;
    context.fillStyle = color("--dim");
    context.fillText("No rounds since this page was opened.", 12, height / 2);
    canvas.setAttribute("aria-label", "No rounds have completed since this page was opened.");
    return;
  }
  const top = Math.max(...known.map((h) => h.p99), 1e-4) * 1.15;
  const y = (value) => height - 4 * ratio - (value / top) * (height - 22 * ratio);
  context.font = font;
  context.fillStyle = color("--dim");
  context.fillText(show(top / 1.15), 6 * ratio, 15 * ratio);
  for (const [name, variable] of [["p99", "--tail"], ["p50", "--accent"]]) {
    context.strokeStyle = color(variable);
    context.lineWidth = 2 * ratio;
    context.beginPath();
    let pen = false;
    history.forEach((h, i) => {
      const x = width - (history.length - 1 - i) * (width / (HISTORY - 1));
      if (h === null) { pen = false; return; }
      if (pen) context.lineTo(x, y(h[name])); else { context.moveTo(x, y(h[name])); context.lineTo(x + 0.1, y(h[name])); }
      pen = true;
    });
    context.stroke();
  }
  const newest = known[known.length - 1];
  canvas.setAttribute("aria-label",
    `Latency of rounds over the last two minutes. Now: median ${show(newest.p50)}, 99th percentile ${show(newest.p99)}.`);
}

// Appends a column to a strip. `values` has a colour for each channel; several channels share a row, and the one that
// stands out most gives it its colour.
function drawColumn(canvas, colors) {
  const context = canvas.getContext("2d");
  const rows = Math.min(colors.length, STRIP_ROWS);
  if (canvas.height !== rows) canvas.height = rows;
  context.drawImage(canvas, -1, 0);
  for (let row = 0; row < rows; ++row) {
    const from = Math.floor(row * colors.length / rows), to = Math.floor((row + 1) * colors.length / rows);
    let chosen = colors[from];
    for (let c = from + 1; c < to; ++c) if (colors[c].weight > chosen.weight) chosen = colors[c];
    context.fillStyle = chosen.css;
    context.fillRect(canvas.width - 1, row, 1, 1);
  }
}

const RED = { css: "#e5252a", weight: Infinity };
const isConstant = (mean, variance) => variance <= 1e-10 * Math.max(1, mean * mean);
const explodes = (mean, variance) => !(Math.abs(mean) <= 1e4 && variance <= 1e8);

function meanColor(mean, variance) {
  if (isConstant(mean, variance) || explodes(mean, variance)) return RED;
  const z = Math.max(-1, Math.min(1, mean / Math.sqrt(variance) / 3));
  return { css: `hsl(${z < 0 ? 211 : 25} ${Math.round(30 + 60 * Math.abs(z))}% ${Math.round(88 - 45 * Math.abs(z))}%)`,
           weight: Math.abs(z) };
}

function varianceColor(mean, variance, middle) {
  if (isConstant(mean, variance) || explodes(mean, variance)) return RED;
  const distance = Math.max(-1, Math.min(1, Math.log10(variance / middle) / 3));  // Decades from the layer's median.
  return { css: `hsl(${Math.round(265 - 105 * (distance + 1))} 65% ${Math.round(45 + 25 * distance)}%)`,
           weight: Math.abs(distance) };
}

// ---- The sections --------------------------------------------------------------------------------------------------

function showGroups(groups, current) {
  const wanted = groups.map((g) => `${g.job}/${g.group}`);
  const list = $("groups");
  if (list.dataset.names !== JSON.stringify(wanted)) {
    list.dataset.names = JSON.stringify(wanted);
    list.replaceChildren(...groups.map((g) => {
      const link = element("a", `${g.job} / ${g.group}`);
      link.href = `#${encodeURIComponent(g.job)}/${encodeURIComponent(g.group)}`;
      const item = element("li");
      item.append(link);
      return item;
    }));
  }
  [...list.children].forEach((item, i) => {
    const is = groups[i] === current;
    if (is) item.firstChild.setAttribute("aria-current", "page"); else item.firstChild.removeAttribute("aria-current");
  });
  $("empty").hidden = groups.length > 0;
  $("group").hidden = groups.length === 0;
}

function showOverview(answer, rate, follower) {
  const s = answer.summary;
  const newest = follower.latency.filter((h) => h !== null).pop();
  const tiles = [
    ["Workers connected", `${s.present} of ${s.worldSize}`, s.present < s.worldSize],
    ["Rounds per second", rate >= 100 ? Math.round(rate).toString() : rate.toFixed(1)],
    ["Median latency", newest ? show(newest.p50) : "–"],
    ["99th percentile", newest ? show(newest.p99) : "–"],
    ["Rounds completed", number(s.roundsCompleted).toLocaleString("en")],
    ["Rounds failed", number(s.roundsFailed).toLocaleString("en"), number(s.roundsFailed) > 0],
    ["In flight, the oldest for", s.roundsInFlight > 0 ? `${s.roundsInFlight}, ${show(seconds(s.oldestRoundAge))}` : "none",
     seconds(s.oldestRoundAge) > 10],
  ];
  $("overview").replaceChildren(...tiles.map(([name, value, bad]) => {
    const tile = element("div");
    tile.append(element("dt", name), element("dd", value, bad ? "bad" : ""));
    return tile;
  }));
}

function showRanks(follower, members) {
  const rows = follower.lateness(members).sort((a, b) => b.mean - a.mean || a.member.rank - b.member.rank);
  const longest = Math.max(...rows.map((r) => r.mean), 1e-9);
  const middle = rows.length > 0 ? rows[Math.floor(rows.length / 2)].mean : 0;
  const slowest = rows[0];
  // With two workers, a rank stands out if it is nearly always the last and costs a millisecond.
  const standsOut = slowest && rows.length > 1 && slowest.mean > 1e-3 &&
    (slowest.mean > 3 * middle || slowest.last > 0.9);
  setText($("ranks-summary"), !slowest || slowest.rounds === 0 ? "No rounds yet." : standsOut ?
    `Rank ${slowest.member.rank} makes the others wait: it contributes ${show(slowest.mean)} after the first, and is the ` +
    `last in ${Math.round(100 * slowest.last)} % of the rounds.` : "No rank stands out.");
  $("ranks").replaceChildren(...rows.slice(0, 64).map((r) => {
    const m = r.member;
    const state = m.state.replace("MEMBER_STATE_", "").toLowerCase();
    const row = element("tr", undefined, standsOut && r === slowest ? "slow" : "");
    const head = element("th", String(m.rank));
    head.scope = "row";
    const late = element("td", show(r.mean));
    const bar = element("span", undefined, "bar");
    bar.style.width = `${Math.round(100 * r.mean / longest)}%`;
    bar.setAttribute("aria-hidden", "true");
    late.append(bar);
    row.append(head, element("td", state, state === "present" ? "good" : state === "lost" ? "bad" : ""), late,
               element("td", `${Math.round(100 * r.last)} %`), element("td", m.description || "–"));
    return row;
  }));
}

function showWaiting(pending, members) {
  const old = pending.filter((p) => seconds(p.age) > 1);
  $("waiting").hidden = old.length === 0;
  $("waiting-list").replaceChildren(...old.slice(0, 8).map((p) => {
    const item = element("li", `${keyText(p.key)} has waited ${show(seconds(p.age))} for ` +
      `${rankText(p.missingRanks, p.missing)}; it fails in ${show(seconds(p.timeLeft))}.`);
    for (const rank of p.missingRanks.slice(0, 4)) {
      const m = members.find((one) => one.rank === rank);
      if (m && m.lastContribution) {
        item.append(element("br"), `Rank ${rank} contributed last to ${keyText(m.lastContribution)}, ` +
          `${show(seconds(m.sinceLastContribution))} ago.`);
      }
    }
    return item;
  }));
}

function showFailures(failures) {
  $("failures").hidden = failures.length === 0;
  $("failures-list").replaceChildren(...failures.slice(0, 8).map((f) => {
    const item = element("li");
    item.append(element("strong", f.result, "bad"), ` at ${new Date(f.beganAt).toLocaleTimeString()}: `,
                f.error ? f.error.message : keyText(f.key), ".");
    if (ADVICE[f.result]) item.append(element("br"), element("span", `What to do: ${ADVICE[f.result]}`));
    return item;
  }));
}

function layerItem(name) {
  const item = element("li");
  const title = element("h3", name);
  const text = element("p", "", "note");
  const strips = element("div", undefined, "strips");
  const canvases = ["Mean by channel", "Variance by channel"].map((caption) => {
    const figure = element("figure");
    const canvas = element("canvas");
    canvas.width = HISTORY;
    canvas.height = 1;
    canvas.setAttribute("role", "img");
    figure.append(canvas, element("figcaption", caption));
    strips.append(figure);
    return canvas;
  });
  item.append(title, text, strips);
  return { item, text, strips, mean: canvases[0], variance: canvases[1] };
}

function channelText(channels) {
  const parts = [];
  if (channels.constant > 0) parts.push(`constant: ${channels.constantChannels.join(", ")}` +
    (channels.constant > channels.constantChannels.length ? ` and ${channels.constant - channels.constantChannels.length} more` : ""));
  if (channels.exploding > 0) parts.push(`exploding: ${channels.explodingChannels.join(", ")}` +
    (channels.exploding > channels.explodingChannels.length ? ` and ${channels.exploding - channels.explodingChannels.length} more` : ""));
  return parts.join("; ");
}

function showLayers(follower, layers) {
  const normal = layers.filter((l) => l.spec.kind !== "LAYER_KIND_SUM");
  const bad = normal.filter((l) => l.channels && (l.channels.constant > 0 || l.channels.exploding > 0));
  setText($("layers-summary"), normal.length === 0 ? "No layers." : bad.length === 0 ?
    `${normal.length} layers; no channel is constant or explodes.` :
    `${bad.length} of ${normal.length} layers have channels that are constant or explode.`);
  // Layers in trouble come first; the others follow in the order of their names.
  const shown = [...bad, ...normal.filter((l) => !bad.includes(l))].slice(0, 200);
  for (const layer of shown) {
    const name = layer.spec.name;
    if (!follower.layers.has(name)) follower.layers.set(name, layerItem(name));
    const entry = follower.layers.get(name);
    const trouble = layer.channels ? channelText(layer.channels) : "";
    setText(entry.text, `${layer.spec.channels} channels. ${trouble ? `Channels ${trouble}.` : ""}` +
      `${layer.conflict ? ` Workers disagree: ${layer.conflict.message}` : ""}`);
    entry.text.className = trouble || layer.conflict ? "bad" : "note";
    const label = layer.channels ? `from ${layer.channels.leastVar.toPrecision(3)} to ${layer.channels.greatestVar.toPrecision(3)}` : "unknown";
    entry.variance.setAttribute("aria-label", `Variance by channel of ${name}: ${label}. ${trouble}`);
    entry.mean.setAttribute("aria-label", `Mean by channel of ${name}. ${trouble}`);
  }
  const items = shown.map((l) => follower.layers.get(l.spec.name).item);
  const list = $("layers");
  if (items.length !== list.children.length || items.some((item, i) => list.children[i] !== item)) list.replaceChildren(...items);
}

// Adds a column to the strips of the layers that can be seen.
async function extendStrips(follower) {
  const visible = [...follower.layers].filter(([, entry]) => {
    const box = entry.item.getBoundingClientRect();
    return entry.item.isConnected && box.bottom > 0 && box.top < innerHeight * 1.5;
  }).slice(0, 12);
  await Promise.all(visible.map(async ([name, entry]) => {
    const answer = await get("layer", { ...follower.id, layer: name });
    const moments = answer.batch && answer.batch.mean && answer.batch.mean.length > 0 ? answer.batch : answer.running;
    if (!moments || !moments.mean || moments.mean.length === 0) return;
    const mean = moments.mean.map(Number), variance = moments.var.map(Number);
    const middle = [...variance].sort((a, b) => a - b)[Math.floor(variance.length / 2)] || 1;
    drawColumn(entry.mean, mean.map((m, c) => meanColor(m, variance[c])));
    drawColumn(entry.variance, variance.map((v, c) => varianceColor(mean[c], v, middle)));
  }));
}

// ---- The loop ------------------------------------------------------------------------------------------------------

let follower = null;

function chosen(groups) {
  const [job, group] = location.hash.slice(1).split("/").map(decodeURIComponent);
  return groups.find((g) => g.job === job && g.group === group) || groups[0];
}

async function look() {
  const [master, list] = await Promise.all([get("master"), get("groups")]);
  setText($("process"), `Version ${master.version}, up ${show(Math.floor(seconds(master.uptime)))}, ` +
    `${master.streams} stream${master.streams === 1 ? "" : "s"}.`);
  const current = chosen(list.groups);
  showGroups(list.groups, current);
  if (!current) { follower = null; return; }
  if (follower === null || follower.id.job !== current.job || follower.id.group !== current.group) {
    follower = new Follower(current.job, current.group);
    $("layers").replaceChildren();
  }
  const [answer, layers] = await Promise.all(
    [get("group", { ...follower.id, parts: "members,pending" }), get("layers", follower.id)]);
  const rate = follower.advance(answer);
  showOverview(answer, rate, follower);
  showWaiting(answer.pending, answer.members);
  showRanks(follower, answer.members);
  // The failures are looked at only when their number has changed: they come with all rounds that are remembered.
  if (follower.failed !== answer.summary.roundsFailed) {
    showFailures((await get("group", { ...follower.id, parts: "failures" })).failures);
    follower.failed = answer.summary.roundsFailed;
  }
  drawLatency($("latency"), follower.latency);
  showLayers(follower, layers.layers);
  await extendStrips(follower);
}

async function run() {
  for (;;) {
    const begun = performance.now();
    try {
      if (!document.hidden) await look();
      setText($("connection"), "");
    } catch (error) {
      setText($("connection"), `The master does not answer: ${error.message}. Trying again.`);
    }
    await new Promise((resolve) => setTimeout(resolve, Math.max(100, PERIOD_MS - (performance.now() - begun))));
  }
}

run();
