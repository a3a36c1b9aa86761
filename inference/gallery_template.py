"""The gallery's style sheet and script, which are the same on every page."""

GENERATOR = "magihuman gallery"

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f5f3; --card: #fff; --text: #1c1d20; --faint: #63666d; --line: #dfdfdb; --accent: #2457c5; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1d1f23; --text: #ececee; --faint: #9b9fa8; --line: #31343a; --accent: #8fb3ff;
    --bad: #ff9a92;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 3rem; max-width: 110rem;
  background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif;
}
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .4rem 1.25rem; margin-bottom: 1.25rem; }
h1 { margin: 0; font-size: 1.5rem; font-weight: 650; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--faint); }
header dl { flex-basis: 100%; }
input {
  order: 1; margin-left: auto; flex: 0 1 18rem; min-width: 10rem; padding: .45rem .75rem; font: inherit;
  color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
}
input + p + dl { order: 2; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
main { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
article {
  display: flex; flex-direction: column; min-width: 0; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
video, .gap { display: block; width: 100%; height: auto; max-height: 75vh; background: #000; }
.gap {
  display: grid; place-items: center; aspect-ratio: 16 / 9; color: var(--faint);
  background: repeating-linear-gradient(45deg, transparent 0 10px, var(--line) 10px 11px);
}
.problem { margin: 0; padding: .75rem 1rem 0; color: var(--bad); font-size: .875rem; font-weight: 600; }
.problem::before { content: "\\26a0\\fe0e\\00a0"; }
.prompt {
  margin: 0; padding: .8rem 1rem; max-height: 14rem; overflow: auto; white-space: pre-line; overflow-wrap: anywhere;
}
dl { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; margin: 0; font-size: .8125rem; }
article dl { padding: 0 1rem .8rem; }
dl div { min-width: 0; }
dt, dd { display: inline; margin: 0; overflow-wrap: anywhere; }
dt { color: var(--faint); margin-right: .4em; }
footer {
  display: flex; gap: 1rem; margin-top: auto; padding: .55rem 1rem; font-size: .8125rem; color: var(--faint);
  border-top: 1px solid var(--line); font-variant-numeric: tabular-nums;
}
footer > * { white-space: nowrap; }
.name { flex: 1; overflow: hidden; text-overflow: ellipsis; }
a { color: var(--accent); }
#none { color: var(--faint); }
"""

# The filter's words can also be given in the address, behind #. One clip plays at a time, since all have sound.
SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll("article")];
const videos = [...document.querySelectorAll("video")];
const filter = document.getElementById("filter"), count = document.getElementById("count");
const all = count.textContent;

function apply() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
    shown += !card.hidden;
    if (card.hidden) card.querySelector("video")?.pause();
  }
  count.textContent = words.length ? `${shown} of ${all}` : all;
  document.getElementById("none").hidden = shown > 0 || !words.length;
}

function fromAddress() {
  try { filter.value = decodeURIComponent(location.hash.slice(1)); } catch { filter.value = ""; }
  apply();
}

for (const video of videos) {
  const card = video.closest("article"), problem = card.querySelector(".problem");
  const ready = () => { video.dataset.metadata = `${video.videoWidth}x${video.videoHeight}`; };
  const failed = () => {
    card.dataset.state = "problem";
    problem.textContent = [problem.textContent, "this browser cannot play it"].filter(Boolean).join("; ");
    problem.hidden = false;
  };
  video.addEventListener("loadedmetadata", ready);
  video.addEventListener("error", failed);
  video.addEventListener("play", () => videos.forEach((other) => other !== video && other.pause()));
  if (video.readyState > 0) ready();
  if (video.error) failed();
}
filter.addEventListener("input", apply);
window.addEventListener("hashchange", fromAddress);
filter.hidden = false;
fromAddress();
"""
