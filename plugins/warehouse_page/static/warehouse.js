// Theme, links out of the frame, and fresh figures. Without it the page is all there, and is reloaded by hand.
"use strict";

const framed = window.parent !== window;

// Airflow puts a class light or dark on its document; on a page of our own there is what it has stored.
function followTheme() {
  const classes = window.parent.document.documentElement.classList;
  const names = ["light", "dark"];
  const theme = framed ? names.find((name) => classes.contains(name)) : localStorage.getItem("theme");
  document.documentElement.dataset.theme = names.includes(theme) ? theme : "";
}
followTheme();
if (framed) {
  new MutationObserver(followTheme).observe(window.parent.document.documentElement, { attributeFilter: ["class"] });
}

// Airflow's frame may not lead its window elsewhere. The window itself may.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[target=_top]");
  if (!link || !framed || event.button !== 0) return;
  event.preventDefault();
  const outside = window.parent.document.createElement("a");
  outside.href = link.href;
  if (event.ctrlKey || event.metaKey || event.shiftKey || link.origin !== location.origin) outside.target = "_blank";
  outside.rel = "noreferrer";
  outside.click();
});

function pageOf(html) {
  return new DOMParser().parseFromString(html, "text/html");
}

// What reads all of a table is asked for when the page is there, and again when there is another load.
async function loadParts() {
  for (const part of document.querySelectorAll("[data-part]")) {
    const address = part.dataset.part;
    delete part.dataset.part;
    const answer = await fetch(address, { headers: { Accept: "text/html" } });
    const found = pageOf(await answer.text());
    const section = found.getElementById(part.id) || found.querySelector("main > *");
    part.replaceChildren(...section.childNodes);
  }
}

function say(text) {
  let notice = document.querySelector(".notice");
  if (!text) return notice?.remove();
  if (!notice) {
    notice = document.createElement("p");
    notice.className = "notice";
    notice.setAttribute("role", "status");
    document.body.prepend(notice);
  }
  notice.textContent = text;
}

// What the reader has open, focused and scrolled to stays so.
function replaceMain(found) {
  const old = document.querySelector("main");
  const main = found.querySelector("main");
  for (const details of old.querySelectorAll("details[open][id]")) {
    main.querySelector(`#${CSS.escape(details.id)}`)?.setAttribute("open", "");
  }
  for (const part of main.querySelectorAll("[data-part]")) {
    const before = old.querySelector(`#${CSS.escape(part.id)}`);
    if (before?.dataset.of === part.dataset.of) part.replaceWith(before);
  }
  const focused = document.activeElement;
  const again = focused?.id
    ? `#${CSS.escape(focused.id)}`
    : focused?.tagName === "SUMMARY"
      ? `#${CSS.escape(focused.parentElement.id)} > summary`
      : focused?.getAttribute("href") && `a[href="${CSS.escape(focused.getAttribute("href"))}"]`;
  const aside = [...old.querySelectorAll(".wide")].map((wide) => wide.scrollLeft);
  old.replaceWith(main);
  [...main.querySelectorAll(".wide")].forEach((wide, at) => (wide.scrollLeft = aside[at] ?? 0));
  if (again) document.querySelector(again)?.focus({ preventScroll: true });
}

const AWAY = "Airflow does not answer: these figures are from before. It is asked again.";
let asking = false;
async function refresh() {
  if (asking || document.hidden || !getSelection().isCollapsed) return;
  asking = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    replaceMain(pageOf(await answer.text()));
    say("");
    await loadParts();
  } catch {
    say(AWAY);
  } finally {
    asking = false;
  }
}

document.addEventListener("DOMContentLoaded", () => {
  loadParts().catch(() => say(AWAY));
  const every = Number(document.querySelector("main").dataset.refresh);
  if (every) setInterval(refresh, every * 1000);
});
