// The page: what to say, the player, and what happens between them.

import { Stream, Unauthorized, apiKey, keepKey, request } from "./api.js";
import { Lines } from "./lines.js";
import { Player } from "./player.js";
import { ReadAlong } from "./read.js";
import { Reference } from "./reference.js";
import { Voices } from "./voices.js";
import { wavFile } from "./wav.js";
import { Waveform, level } from "./waveform.js";

const SAMPLE_RATE = 24000;
const $ = (id) => document.getElementById(id);
const voices = new Voices();
const waveform = new Waveform($("waveform"));
const lines = new Lines($("lines"));
const read = new ReadAlong($("read"), lines);
const player = new Player(showControls);
const reference = new Reference(voices, voiceAdded);
let stream = null; // while speech is generated

const talking = () => $("tab-talk").getAttribute("aria-selected") === "true";

// Speak

async function speak() {
  const turns = talking() ? talk() : [{ voice: $("voice").value, text: $("text").value }];
  if (!turns.some((turn) => turn.text.trim())) {
    problem("There is nothing to say yet.");
    (talking() ? lines.firstField() : $("text")).focus();
    return;
  }
  await player.unlock(SAMPLE_RATE);
  begin();
  const started = performance.now();
  // What arrives after a stop is dropped: stream is another one then, or null.
  const own = new Stream(
    (samples) => own === stream && heard(samples, started),
    (clause) => own === stream && read.add(clause),
  );
  stream = own;
  showControls();
  try {
    await own.open();
    const end = await speakTurns(own, turns.filter((turn) => turn.text.trim()));
    if (own === stream) say(`Spoken: ${player.length.toFixed(1)} s.`);
    else if (stream === null && end.text) say(`Stopped after “${end.text}”.`);
  } catch (error) {
    if (own === stream) problem(error.message);
  } finally {
    own.close();
    if (own === stream) {
      stream = null;
      player.finish();
    }
  }
}

// The event that ended the last turn that was begun.
async function speakTurns(own, turns) {
  const used = new Set();
  let end = {};
  for (const [index, turn] of turns.entries()) {
    if (own !== stream) break;
    read.turn(player.length, turn.who, turn.line);
    const fields = voices.fields(turn.voice, turn.speaker, !used.has(turn.voice));
    used.add(turn.voice);
    end = await own.speak({ ...settings(index), ...fields }, turn.text);
    if (own === stream) $("used-seed").textContent ||= String(own.seed);
  }
  return end;
}

// The lines of the conversation, each with its voice and speaker id.
function talk() {
  const chosen = [$("voice-a").value, $("voice-b").value];
  const speakers = Voices.speakers(...chosen);
  return lines.list().map(({ who, text, line }) => {
    const index = who === "A" ? 0 : 1;
    return { who, text, line, voice: chosen[index], speaker: speakers[index] };
  });
}

function settings(index) {
  const seed = $("seed").value.trim();
  const fields = { speed: Number($("speed").value) };
  if ($("temperature").dataset.moved) fields.temperature = Number($("temperature").value); // else the model's own
  if (seed) fields.seed = Number(seed) + 1000 * index; // sentences of a turn take the seeds that follow
  return fields;
}

function begin() {
  player.reset();
  waveform.reset();
  read.reset();
  problem("");
  say("Generating …");
  for (const id of ["first-audio", "rtf", "length"]) $(id).textContent = "–";
  $("used-seed").textContent = "";
  $("waveform").setAttribute("aria-label", "Waveform of the speech");
}

function heard(samples, started) {
  if (!player.length) $("first-audio").textContent = `${Math.round(performance.now() - started)} ms`;
  if (!player.length) requestAnimationFrame(frame);
  player.push(samples);
  waveform.push(samples);
  figures(started);
  showControls();
}

function figures(started) {
  if (!player.length) return;
  const seconds = (performance.now() - started) / 1000;
  $("rtf").textContent = (seconds / player.length).toFixed(2);
  $("length").textContent = `${player.length.toFixed(1)} s`;
}

function stop() {
  if (!player.playing && !stream) return;
  const own = stream;
  stream = null;
  const played = player.position();
  own?.cancel(Math.max(0, played - read.start)); // seconds of the current turn
  player.stop();
  $("length").textContent = `${played.toFixed(1)} s`;
  say(`Stopped after ${played.toFixed(1)} s.`);
}

// While it plays, once a frame of the screen

function frame() {
  const position = player.position();
  waveform.draw(position, player.playing ? level(player.analyser) : 0);
  read.show(player.playing ? position : -1);
  if (player.playing || stream) requestAnimationFrame(frame);
}

function showControls() {
  const busy = stream !== null || player.playing;
  $("speak").disabled = stream !== null;
  $("stop").disabled = !busy;
  $("replay").disabled = busy || !player.length;
  const whole = !stream && player.length > 0;
  $("download").setAttribute("aria-disabled", String(!whole));
  if ($("download").href) URL.revokeObjectURL($("download").href);
  if (whole) $("download").href = URL.createObjectURL(wavFile(player.samples(), SAMPLE_RATE));
  else $("download").removeAttribute("href");
  waveform.draw(player.position(), 0);
}

function say(text) {
  $("status").textContent = text;
}

function problem(text) {
  $("problem").textContent = text;
  if (text) say("");
}

// Voices, key, tabs

function fillVoices(chosen) {
  const first = voices.server[0];
  voices.fill($("voice"), chosen || $("voice").value || first);
  voices.fill($("voice-a"), chosen || $("voice-a").value || first);
  voices.fill($("voice-b"), $("voice-b").value || voices.server[1] || first);
}

function voiceAdded(name) {
  fillVoices(name);
  $("reference").open = false;
  say(`The voice ${name} was added and is chosen.`);
  $("voice").focus();
}

async function load() {
  try {
    await voices.load();
    const models = await request("/v1/models");
    $("model").textContent = models.data[0].id;
    $("change-key").hidden = !apiKey();
    fillVoices();
    reference.describe();
    return true;
  } catch (error) {
    if (error instanceof Unauthorized) askForKey(apiKey() ? error.message : "");
    else problem(`The server cannot be reached: ${error.message}`);
    return false;
  }
}

function askForKey(message) {
  $("key-problem").textContent = message;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  keepKey($("key").value.trim());
  if (await load()) $("key-dialog").close();
});

function choose(tab) {
  for (const name of ["text", "talk"]) {
    const chosen = tab.id === `tab-${name}`;
    $(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    $(`panel-${name}`).hidden = !chosen;
  }
}

for (const tab of [$("tab-text"), $("tab-talk")]) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tab.id === "tab-text" ? $("tab-talk") : $("tab-text");
    choose(other);
    other.focus();
  });
}

for (const name of ["temperature", "speed"]) {
  $(name).addEventListener("input", () => {
    $(name).dataset.moved = "yes";
    $(`${name}-value`).textContent = Number($(name).value).toFixed(2);
  });
}

$("speak").addEventListener("click", speak);
$("stop").addEventListener("click", stop);
$("replay").addEventListener("click", () => {
  player.replay();
  requestAnimationFrame(frame);
});
$("change-key").addEventListener("click", () => askForKey(""));
$("add-line").addEventListener("click", () => lines.add().focus());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) stop();
  if (event.key === "Enter" && event.ctrlKey && !$("speak").disabled) speak();
});

load();
