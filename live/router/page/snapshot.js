// What one snapshot of the router says, put on the page.

import { $, fill, HISTORY_S, line, marked, put } from "./draw.js";
import { clock, compact, count, percent, rate, seconds, signed, span, whole } from "./words.js";

const PATHS = {
  disaggregate: ["■", "plain", "disaggregate"],
  deflect: ["◆", "fair", "deflect"],
  local: ["●", "good", "local"],
  reject: ["✕", "bad", "reject"],
};
const STATES = {
  healthy: ["●", "good"],
  draining: ["◐", "fair"],
  broken: ["▲", "bad"],
  down: ["✕", "bad"],
};
const BREAKERS = { closed: ["●", "good"], "half-open": ["◐", "fair"], open: ["▲", "bad"] };

const history = [];

export function show(snapshot) {
  const { nodes, decisions, ...past } = snapshot;
  history.push(past);
  while (past.time_s - history[0].time_s > HISTORY_S || history[0].time_s > past.time_s) history.shift();
  showRouter(snapshot);
  showTiles(snapshot);
  showLines();
  showNodes(nodes);
  showPaths(snapshot);
  showDecisions(decisions);
}

function showRouter({ router, up_s }) {
  put($("policy"), router.policy);
  put($("state"), router.state);
  put($("up"), span(up_s));
  put($("version"), router.version);
}

const deflectedShare = ({ paths, ended }) =>
  ended.requests ? paths.find(({ path }) => path === "deflect").requests / ended.requests : null;

// Seconds, a multiple of the prompt's prefill time on an idle node, or both.
const ttftSlo = ({ ttft_s, ttft_prefills }) =>
  [ttft_s && seconds(ttft_s), ttft_prefills && `${ttft_prefills}x prefill`].filter(Boolean).join(" + ");

function showTiles(snapshot) {
  const { router, ttft, tbt, ended, window_s, up_s } = snapshot;
  put($("in-flight"), whole(router.in_flight));
  put($("in-flight-note"), `of ${whole(router.most_in_flight)} that are let in`);
  put($("rate"), rate(ended.per_s));
  put($("rate-note"), `${whole(ended.requests)} ended in ${span(ended.span_s)}, ${whole(ended.failed)} failed`);
  put($("ttft"), percent(ttft.attained));
  const ttfts = `P50 ${seconds(ttft.p50_s, "∞")}, P95 ${seconds(ttft.p95_s, "∞")}`;
  put($("ttft-note"), ttft.requests ? ttfts : "no first token yet");
  const never = ttft.failed ? `, ${whole(ttft.failed)} never came` : "";
  const firsts = `${count(ttft.requests - ttft.failed, "first token")} in ${span(ttft.span_s)}${never}`;
  put($("ttft-count"), ttft.requests ? firsts : "");
  put($("ttft-slo"), `Default SLO ${ttftSlo(router.slo)}`);
  put($("tbt"), percent(tbt.attained));
  put($("tbt-note"), tbt.gaps ? `P50 ${seconds(tbt.p50_s)}, P95 ${seconds(tbt.p95_s)}` : "no tokens yet");
  const gaps = `${count(tbt.gaps, "gap")} in ${span(Math.min(window_s, up_s))}`;
  put($("tbt-count"), tbt.gaps ? gaps : "");
  put($("tbt-slo"), `Default SLO ${seconds(router.slo.tbt_s)}`);
  const share = deflectedShare(snapshot);
  put($("deflected"), percent(share));
  const all = `of ${count(ended.requests, "request")} in ${span(ended.span_s)}`;
  put($("deflected-note"), share == null ? "no requests yet" : all);
}

function showLines() {
  const range = (format, what) => (low, high) => `${what} ${format(low)} to ${format(high)} in ${HISTORY_S} s`;
  line("in-flight", history, (past) => past.router.in_flight, range(whole, "In flight"));
  line("rate", history, (past) => past.ended.per_s, range(rate, "Per second"));
  line("ttft", history, (past) => past.ttft.p95_s, range(seconds, "P95"));
  line("tbt", history, (past) => past.tbt.p95_s, range(seconds, "P95"));
  line("deflected", history, deflectedShare, range(percent, "Share"));
}

function showNodes(nodes) {
  const states = new Map();
  for (const { state } of nodes) states.set(state, (states.get(state) ?? 0) + 1);
  put($("nodes-note"), [...states].map(([state, n]) => `${n} ${state}`).join(", "));
  // Whoever looks for trouble among many nodes finds it on top.
  const sorted = [...nodes].sort((a, b) => (a.state === "healthy") - (b.state === "healthy"));
  const rows = sorted.map((node) => [
    node.name,
    node.role,
    marked(STATES[node.state] ?? ["?", "bad"], node.state),
    marked(BREAKERS[node.breaker] ?? ["?", "bad"], node.breaker),
    whole(node.prefill_tokens_ahead),
    whole(node.requests),
    `${whole(node.decodes)} of ${whole(node.most_sequences)}`,
    {
      text: `${whole(node.kv_tokens_used)} of ${compact(node.kv_tokens_capacity)}`,
      share: node.kv_tokens_used / node.kv_tokens_capacity,
    },
    whole(node.deflected_in_flight),
    whole(node.incoming),
    node.reports === "none" ? "no report" : seconds(node.report_age_s),
  ]);
  fill("nodes", rows, [4, 5, 6, 7, 8, 9, 10], () => ["No nodes"]);
}

function showPaths({ paths, ended, ttft, window_s }) {
  put($("paths-note"), `last ${span(Math.min(window_s, ended.span_s))}; TTFT of streamed answers`);
  const rows = paths
    .filter((path) => path.since_start)
    .map((path) => [
      marked(PATHS[path.path], path.path),
      whole(path.requests),
      percent(ended.requests ? path.requests / ended.requests : null),
      whole(path.failed),
      whole(path.since_start),
      percent(path.ttft.attained),
      path.ttft.requests ? seconds(path.ttft.p50_s, "∞") : "—",
      path.ttft.requests ? seconds(path.ttft.p95_s, "∞") : "—",
      seconds(path.predicted_p50_s),
      signed(path.error_p50_s),
      seconds(path.absolute_error_p95_s),
    ]);
  fill("paths", rows, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], () => ["No requests yet"]);
}

function showDecisions(decisions) {
  put($("decisions-note"), decisions.length ? "bold: the estimate of the chosen path" : "");
  const rows = decisions.map((one) => [
    `#${one.number}${one.attempt > 1 ? `, try ${one.attempt}` : ""}`,
    clock(one.time_s),
    marked(PATHS[one.path], one.path),
    one.reason.replaceAll("_", " "),
    whole(one.prompt_tokens),
    one.prefill_node ?? "—",
    one.decode_node ?? "—",
    { text: seconds(one.ttft_prefill_path_s), name: one.path === "disaggregate" ? "chosen" : "" },
    { text: seconds(one.ttft_decode_path_s), name: one.path === "deflect" || one.path === "local" ? "chosen" : "" },
    seconds(one.ttft_slo_s),
    actualTtft(one),
  ]);
  fill("decisions", rows, [4, 7, 8, 9, 10], firstRequest);
}

function actualTtft({ ttft_s, ttft_slo_s, is_streamed, has_failed }) {
  if (has_failed) return marked(["✕", "bad"], "failed");
  if (ttft_s == null) return is_streamed ? "—" : "not streamed";
  if (ttft_s <= ttft_slo_s) return marked(["✓", "good"], seconds(ttft_s));
  return marked(["✕", "bad"], `${seconds(ttft_s)}, late`);
}

function firstRequest() {
  const code = document.createElement("pre");
  code.textContent =
    `curl ${new URL("v1/completions", document.baseURI)} -H 'content-type: application/json' \\\n` +
    `  -d '{"model": "MODEL", "prompt": "Once", "stream": true}'`;
  return ["No requests yet. Send one:", code];
}
