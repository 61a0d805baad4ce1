// Numbers in words; a dash where there is none.

export const whole = (n) => (n == null ? "—" : Math.round(n).toLocaleString("en"));
export const compact = (n) => n.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
export const percent = (share) => {
  if (share == null) return "—";
  const value = 100 * share;
  return `${value === 100 || value === 0 ? value : Math.min(99.9, Math.max(0.1, value)).toFixed(1)} %`;
};
export const rate = (n) => (n >= 100 ? whole(n) : n.toFixed(1));
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");

export function seconds(s, none = "—") {
  if (s == null) return none;
  const size = Math.abs(s);
  if (size < 0.00995) return `${(1000 * s).toFixed(1)} ms`;
  if (size < 0.9995) return `${Math.round(1000 * s)} ms`;
  return size < 99.95 ? `${s.toFixed(size < 9.995 ? 2 : 1)} s` : `${whole(s)} s`;
}

export function span(s) {
  if (s < 99.5) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 100) return `${minutes} min`;
  return minutes < 60 * 48 ? `${Math.round(minutes / 60)} h` : `${Math.round(minutes / 1440)} d`;
}

export const signed = (s) => (s == null ? "—" : (s > 0 ? "+" : s < 0 ? "−" : "") + seconds(Math.abs(s)));
export const count = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
