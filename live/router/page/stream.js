// Follows the router's snapshots, comes back after every break, and asks for a key where one is needed.

import { $, put } from "./draw.js";
import { show } from "./snapshot.js";
import { clock } from "./words.js";

const KEY = "deflector-api-key";
const EVENTS = new URL("dashboard/events", document.baseURI);
const SILENCE_MS = 5000;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;

let key = sessionStorage.getItem(KEY);
let isPaused = false;
let asksForKey = false;
let pauseMs = FIRST_PAUSE_MS;
let shownAt = "";
let connection = new AbortController();
let wake = () => {};

const isWanted = () => !isPaused && !asksForKey && !document.hidden;
const sleep = (ms) => new Promise((done) => ((wake = done), ms < Infinity && setTimeout(done, ms)));

function say(mark, kind, text) {
  put($("status-mark"), mark);
  $("status").setAttribute("class", kind);
  put($("status-text"), text);
  document.body.classList.toggle("stale", kind === "bad" && shownAt !== "");
}

async function watch() {
  for (;;) {
    if (!isWanted()) {
      await sleep(Infinity);
      continue;
    }
    connection = new AbortController();
    let why = "";
    try {
      await follow(connection);
    } catch (error) {
      why = error instanceof Refused ? `: ${error.message}` : "";
    }
    if (!isWanted()) continue;
    say("✕", "bad", `Disconnected${why}; trying again.${shownAt && ` The figures are of ${shownAt}.`}`);
    put($("state"), "unknown");
    await sleep(pauseMs * (0.75 + Math.random() / 2));
    pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
  }
}

class Refused extends Error {}

// Shows snapshots until the router ends the stream, or says nothing for too long.
async function follow(abort) {
  let timer = setTimeout(() => abort.abort(), SILENCE_MS);
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const response = await fetch(EVENTS, { headers, signal: abort.signal, cache: "no-store" });
    if (response.status === 401) return askForKey(Boolean(key));
    if (!response.ok) throw new Refused((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => abort.abort(), SILENCE_MS);
      const events = (text + value).split("\n\n");
      text = events.pop();
      if (events.length) connected(JSON.parse(events.at(-1).slice("data: ".length)));
    }
  } finally {
    clearTimeout(timer);
    abort.abort();
  }
}

function connected(snapshot) {
  if (!isWanted()) return;
  pauseMs = FIRST_PAUSE_MS;
  shownAt = clock(snapshot.time_s);
  try {
    show(snapshot);
  } catch (error) {
    reportError(error); // In the console: it is no fault of the connection.
  }
  $("figures").hidden = $("pause").hidden = false;
  say("●", "good", "Live");
  $("forget").hidden = !key;
}

function askForKey(wasWrong) {
  asksForKey = true;
  forgetKey();
  say("▲", "fair", wasWrong ? "The router does not know this key" : "An API key is needed");
  $("figures").hidden = $("pause").hidden = true;
  $("key-form").hidden = false;
  $("key").focus();
}

function forgetKey() {
  key = null;
  sessionStorage.removeItem(KEY);
  $("forget").hidden = true;
}

function changed() {
  if (!isWanted()) connection.abort();
  wake();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem(KEY, key);
  $("key").value = "";
  $("key-form").hidden = true;
  asksForKey = false;
  say("◐", "fair", "Connecting");
  changed();
});
$("forget").addEventListener("click", () => {
  connection.abort();
  askForKey(false);
});
$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) say("‖", "fair", `Paused${shownAt && ` at ${shownAt}`}`);
  else say("◐", "fair", "Connecting");
  changed();
});
document.addEventListener("visibilitychange", changed);
say("◐", "fair", "Connecting");
watch();
