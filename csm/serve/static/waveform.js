// The waveform: bars of the peak in equal stretches of the audio, those that were heard in the accent colour.

const BLOCK = 480; // samples of a peak: 20 ms
const STEP = 5, WIDTH = 3; // CSS pixels from bar to bar, and of a bar
const SHORTEST = 2; // seconds that fill the canvas at least

export class Waveform {
  constructor(canvas) {
    this.canvas = canvas;
    this.peaks = [];
    this.rest = new Float32Array(0);
    new ResizeObserver(() => this.draw(0, 0)).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(0, 0));
  }

  reset() {
    this.peaks = [];
    this.draw(0, 0);
  }

  push(samples) {
    for (let at = 0; at < samples.length; at += BLOCK) {
      let peak = 0;
      for (const sample of samples.subarray(at, at + BLOCK)) peak = Math.max(peak, Math.abs(sample));
      this.peaks.push(peak);
    }
  }

  // position: seconds that were heard. level: of the samples that sound now.
  draw(position, level) {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const bars = Math.max(1, Math.floor(width / STEP));
    const perBar = Math.max(this.peaks.length, (SHORTEST * 24000) / BLOCK) / bars;
    const heard = (position * 24000) / BLOCK / perBar;
    for (let bar = 0; bar < bars; bar++) {
      const from = Math.floor(bar * perBar);
      const inBar = this.peaks.slice(from, Math.max(Math.floor((bar + 1) * perBar), from + 1));
      const current = Math.floor(heard) === bar && level > 0;
      const peak = current ? Math.max(level, ...inBar) : Math.max(0, ...inBar);
      const tall = Math.max(2, Math.sqrt(peak) * (height - 16));
      pen.fillStyle = style.getPropertyValue(bar < heard ? "--accent" : "--bar");
      pen.fillRect(bar * STEP + 1, (height - tall) / 2, WIDTH, tall);
    }
  }
}

// The level of what an AnalyserNode hears now.
export function level(analyser) {
  if (!analyser) return 0;
  const samples = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(samples);
  return samples.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0);
}
