// A voice of one's own: record it or choose a file, say what is said in it and who agreed.

import { request } from "./api.js";
import { SAMPLE_RATE, base64, decode, wavFile } from "./wav.js";

const MIN_SECONDS = 0.5, MAX_SECONDS = 60;
const $ = (id) => document.getElementById(id);

export class Reference {
  constructor(voices, onAdded) {
    this.voices = voices;
    this.onAdded = onAdded;
    this.wav = null;
    $("record").addEventListener("click", () => this.toggle());
    $("recording").addEventListener("change", () => this.choose($("recording").files[0]));
    $("voice-form").addEventListener("submit", (event) => this.submit(event));
  }

  describe() {
    $("kept").textContent = this.voices.writable
      ? "The server keeps the recording until somebody deletes the voice."
      : "This server keeps no voices: the recording stays in this page until it is closed.";
  }

  async toggle() {
    if (this.recorder) {
      this.recorder.stop();
      return;
    }
    $("voice-problem").textContent = "";
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
      this.record(stream);
    } catch {
      $("voice-problem").textContent =
        "The microphone cannot be used: allow it, and open this page by https or on this machine.";
    }
  }

  record(stream) {
    const parts = [];
    const recorder = (this.recorder = new MediaRecorder(stream));
    const started = performance.now();
    const timer = setInterval(() => {
      const seconds = (performance.now() - started) / 1000;
      $("recording-state").textContent = `Recording: ${Math.floor(seconds)} s`;
      if (seconds >= MAX_SECONDS) recorder.stop();
    }, 1000);
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = () => {
      clearInterval(timer);
      stream.getTracks().forEach((track) => track.stop());
      this.recorder = null;
      this.show(false);
      this.choose(new Blob(parts, { type: recorder.mimeType }));
    };
    recorder.start();
    this.show(true);
  }

  show(recording) {
    $("record").setAttribute("aria-pressed", String(recording));
    $("record").textContent = recording ? "Stop recording" : "Record";
  }

  async choose(blob) {
    if (!blob) return;
    $("voice-problem").textContent = "";
    try {
      const samples = await decode(blob);
      const seconds = samples.length / SAMPLE_RATE;
      if (seconds < MIN_SECONDS || seconds > MAX_SECONDS) {
        throw new Error(`The recording has ${seconds.toFixed(1)} s: it needs ${MIN_SECONDS} to ${MAX_SECONDS} s.`);
      }
      this.wav = wavFile(samples, SAMPLE_RATE);
      $("recording-state").textContent = `Recording: ${seconds.toFixed(1)} s`;
      if ($("preview").src) URL.revokeObjectURL($("preview").src);
      $("preview").src = URL.createObjectURL(this.wav);
      $("preview").hidden = false;
    } catch (error) {
      this.wav = null;
      const known = error instanceof DOMException ? "This file cannot be decoded as audio." : error.message;
      $("voice-problem").textContent = known;
    }
  }

  async submit(event) {
    event.preventDefault();
    const missing = this.missing();
    $("voice-problem").textContent = missing ? missing.message : "";
    if (missing) {
      missing.field.focus();
      return;
    }
    const name = $("voice-name").value.trim();
    try {
      await this.keep(name, $("transcript").value.trim());
      this.onAdded(name);
    } catch (error) {
      $("voice-problem").textContent = error.message;
    }
  }

  missing() {
    const empty = (id) => !$(id).value.trim();
    if (!this.wav) return { field: $("record"), message: "Record something, or choose a file." };
    if (empty("transcript")) return { field: $("transcript"), message: "Write what is said in the recording." };
    if (empty("voice-name")) return { field: $("voice-name"), message: "Give the voice a name." };
    if (empty("consent")) return { field: $("consent"), message: "Say who agreed, and how." };
    if (!$("agreed").checked) return { field: $("agreed"), message: "The person in the recording must agree." };
    return null;
  }

  async keep(name, text) {
    if (!this.voices.writable) {
      this.voices.page.set(name, { text, audio: await base64(this.wav) });
      return;
    }
    const form = new FormData();
    form.append("name", name);
    form.append("text", text);
    form.append("consent", $("consent").value.trim());
    form.append("audio_sample", this.wav, "recording.wav");
    await request("/v1/audio/voices", { method: "POST", body: form });
    await this.voices.load();
  }
}
