// Keeps the page up to date: the node sends the same fragment it first rendered, escaped by its templates.
"use strict";

const live = document.getElementById("live");
const news = document.getElementById("news");
const connection = document.getElementById("connection");

function showConnection(state, text) {
  connection.dataset.state = state;
  connection.textContent = text;
}

function localizeTimes() {
  for (const time of live.querySelectorAll("time")) {
    const at = new Date(time.dateTime);
    time.textContent = at.toLocaleTimeString([], { hour12: false });
    time.title = at.toLocaleString();
  }
}

// Screen readers hear the headline when it changes, not every figure of every table.
function tellNews() {
  const figures = [...live.querySelectorAll(".figures li")].map((item) => item.innerText.replace(/\s+/g, " "));
  const text = figures.join(", ");
  if (news.textContent !== text) news.textContent = text;
}

function textsByRow() {
  const rows = live.querySelectorAll("tr[data-key]");
  return new Map([...rows].map((row) => [row.dataset.key, [...row.cells].map((cell) => cell.textContent)]));
}

function showFragment(fragment) {
  const before = textsByRow();
  live.innerHTML = fragment;
  localizeTimes();
  tellNews();
  for (const row of live.querySelectorAll("tr[data-key]")) {
    const old = before.get(row.dataset.key);
    [...row.cells].forEach((cell, index) => {
      if (!old || old[index] !== cell.textContent) cell.classList.add("changed");
    });
  }
}

localizeTimes();
const events = new EventSource("/events");
events.addEventListener("open", () => showConnection("live", "live"));
events.addEventListener("error", () => {
  showConnection("lost", events.readyState === EventSource.CLOSED ? "not live: reload" : "reconnecting…");
});
events.addEventListener("view", (event) => showFragment(event.data));
