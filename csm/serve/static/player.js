// Plays samples while they arrive: each chunk is an AudioBuffer that is scheduled behind the one before it.
// Unlike an AudioWorklet, this also works where the page is not a secure context, as on a phone in the local network.

const LEAD = 0.08; // seconds between the arrival of the first chunk and its start

export class Player {
  constructor(onChange) {
    this.onChange = onChange;
    this.context = null;
    this.chunks = [];
    this.reset();
  }

  // Browsers start audio in answer to a click or a key only, so this is called from there.
  unlock(sampleRate) {
    if (this.context === null) {
      this.context = new AudioContext({ sampleRate });
      this.analyser = this.context.createAnalyser();
      this.analyser.fftSize = 2048;
      this.analyser.connect(this.context.destination);
    }
    return this.context.resume();
  }

  reset() {
    this.silence();
    this.chunks = [];
    this.length = 0; // seconds
    this.complete = false;
  }

  silence() {
    for (const { source } of this.scheduled || []) {
      source.onended = null;
      source.stop();
    }
    this.scheduled = [];
    this.playing = false;
  }

  push(samples) {
    this.chunks.push(samples);
    this.length += samples.length / this.context.sampleRate;
    this.schedule(samples);
  }

  schedule(samples) {
    const last = this.scheduled.at(-1);
    const buffer = this.context.createBuffer(1, samples.length, this.context.sampleRate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.analyser);
    const now = this.context.currentTime;
    const behind = last ? last.at + last.duration : 0;
    const at = behind >= now ? behind : now + LEAD;
    const offset = last ? last.offset + last.duration : 0;
    source.start(at);
    source.onended = () => this.ended(source);
    this.scheduled.push({ source, at, offset, duration: buffer.duration });
    this.playing = true;
  }

  ended(source) {
    if (this.complete && source === this.scheduled.at(-1)?.source) {
      this.playing = false;
      this.onChange();
    }
  }

  // No more samples will come.
  finish() {
    this.complete = true;
    const last = this.scheduled.at(-1);
    if (!last || last.at + last.duration <= this.context.currentTime) this.playing = false;
    this.onChange();
  }

  // Seconds that have been heard.
  position() {
    const now = this.context ? this.context.currentTime : 0;
    let heard = 0;
    for (const { at, offset, duration } of this.scheduled) {
      if (at > now) break;
      heard = offset + Math.min(now - at, duration);
    }
    return heard;
  }

  // Stop, and forget what was not heard.
  stop() {
    const heard = this.position();
    this.silence();
    const samples = this.samples().subarray(0, Math.round(heard * this.context.sampleRate));
    this.chunks = [samples];
    this.length = heard;
    this.complete = true;
    this.onChange();
  }

  replay() {
    this.silence();
    this.complete = true;
    this.schedule(this.samples());
    this.onChange();
  }

  samples() {
    const all = new Float32Array(this.chunks.reduce((sum, chunk) => sum + chunk.length, 0));
    let at = 0;
    for (const chunk of this.chunks) {
      all.set(chunk, at);
      at += chunk.length;
    }
    return all;
  }
}
