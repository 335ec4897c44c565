// What a page does by itself: theme, menu on a small screen, search. All of it from the site's own folder.
// biome-ignore lint/suspicious/noRedundantUseStrict: pages load it as a script, no module, so that it works from files
"use strict";
const root = document.documentElement;

const button = document.querySelector(".theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const stored = (() => { try { return localStorage.getItem("gclib-theme"); } catch { return null; } })();
const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { button.textContent = isDark() ? "Light" : "Dark"; button.title = `Show the ${isDark() ? "light" : "dark"} theme`; };
if (stored === "light" || stored === "dark") root.dataset.theme = stored;
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("gclib-theme", root.dataset.theme); } catch { /* a private window: for this page alone */ }
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

if (matchMedia("(max-width: 60rem)").matches) document.querySelector("nav > details").open = false;

// What is wider than the page scrolls by keyboard too; what fits is no stop.
const makeStops = () => {
  for (const part of document.querySelectorAll("pre, .scroll")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0; else part.removeAttribute("tabindex");
  }
};
addEventListener("resize", makeStops);
makeStops();

// Search: sections.js holds [address, heading, text] of every section; a script, as pages from files may fetch nothing.
const field = document.querySelector("input[type=search]");
const found = document.querySelector(".found"), MOST = 12;
const loadSections = () => new Promise((resolve, reject) => {
  if (window.SECTIONS) return resolve(window.SECTIONS);
  const script = document.createElement("script");
  script.src = `${root.dataset.root}sections.js`;
  script.onload = () => resolve(window.SECTIONS);
  script.onerror = reject;
  document.head.append(script);
});
const search = async () => {
  const asked = field.value, words = asked.toLowerCase().split(/\s+/).filter(word => word.length > 1);
  found.hidden = !words.length;
  if (found.hidden) return;
  const sections = await loadSections();
  if (field.value !== asked) return;
  const ranked = [];
  for (const [address, heading, text] of sections) {
    const title = heading.toLowerCase(), body = text.toLowerCase();
    if (!words.every(word => title.includes(word) || body.includes(word))) continue;
    const rank = words.filter(word => title.includes(word)).length;
    ranked.push({ address, heading, rank, near: body.indexOf(words[0]), text });
  }
  ranked.sort((one, other) => other.rank - one.rank);
  const count = ranked.length > MOST ? `${ranked.length} sections, the first ${MOST}:` : `${ranked.length} sections:`;
  found.querySelector("p").textContent = ranked.length ? count : "No section has all these words.";
  found.querySelector("ul").replaceChildren(...ranked.slice(0, MOST).map(({ address, heading, near, text }) => {
    const line = document.createElement("li"), link = document.createElement("a");
    link.href = root.dataset.root + address;
    link.textContent = heading;
    line.append(link, near < 0 ? "" : ` … ${text.slice(Math.max(0, near - 40), near + 80)} …`);
    return line;
  }));
};
field.addEventListener("input", search);
field.form.addEventListener("submit", event => { event.preventDefault(); found.querySelector("a")?.click(); });
field.form.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  field.value = "";
  field.focus();
  search();
});

// The live lab, where a page has a place for it: a module and its numbers, which browsers load from a server alone.
for (const lab of document.querySelectorAll(".lab")) {
  const folder = new URL(`${root.dataset.root}lab/`, document.baseURI).href;
  const words = lab.querySelector("[role=status]");
  if (location.protocol === "file:") {
    words.textContent = "Browsers load the live lab from a server only. In the site's folder type python -m http.server, "
      + "then open lab.html at localhost:8000.";
  } else {
    import(`${folder}lab.js`)
      .then(({ mount }) => mount(lab.querySelector("div"), `${folder}bundles/`))
      .then(() => words.remove(), error => { words.textContent = `The lab could not be loaded: ${error.message}.`; });
  }
}
