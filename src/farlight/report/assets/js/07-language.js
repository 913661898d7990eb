/* Strings and number formats of the chosen language. */
"use strict";
(() => {
  const STRINGS = JSON.parse(document.getElementById("strings").textContent);
  const preferred = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  FL.language = preferred;

  /* The string of a name with its {placeholders} replaced; a missing string shows its name. */
  FL.say = (name, values = {}) => {
    const words = STRINGS[FL.language][name];
    if (words === undefined) {
      console.error(`no words for ${name} in ${FL.language}`);
      return name;
    }
    return words.replace(/\{(\w+)\}/g, (match, key) => (key in values ? String(values[key]) : match));
  };

  const locale = () => (FL.language === "zh" ? "zh-CN" : "en-US");
  FL.number = (value) => new Intl.NumberFormat(locale()).format(value);
  FL.fixed = (value, digits) => new Intl.NumberFormat(locale(), { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
  FL.short = (value) => new Intl.NumberFormat(locale(), { notation: "compact", maximumSignificantDigits: 3 }).format(value);

  /* A percentage that rounding turns into neither 0 nor 100. */
  FL.percent = (share, digits = 1) => {
    const percent = 100 * share;
    if (percent > 0 && percent < 0.095) return `${FL.plain(percent)}%`;
    if (percent < 100 && percent > 99.95) return `${FL.fixed(Math.floor(percent * 1000) / 1000, 3)}%`;
    return `${FL.fixed(percent, digits)}%`;
  };

  FL.plain = (value) => new Intl.NumberFormat(locale(), { maximumSignificantDigits: 2, maximumFractionDigits: 12 }).format(value);

  FL.seconds = (seconds) => {
    if (seconds >= 5400) return FL.say("unit.hours", { value: FL.fixed(seconds / 3600, 1) });
    if (seconds >= 90) return FL.say("unit.minutes", { value: FL.fixed(seconds / 60, 1) });
    return seconds >= 0.1 ? FL.say("unit.seconds", { value: FL.fixed(seconds, 2) }) : FL.say("unit.ms", { value: FL.plain(seconds * 1000) });
  };

  FL.bytes = (size) => (size >= 2 ** 30 ? `${FL.fixed(size / 2 ** 30, 1)} GiB` : `${FL.fixed(size / 2 ** 20, 0)} MiB`);

  /* Sets the strings of all elements with data-t, data-t-label or data-t-hint. */
  FL.translate = () => {
    document.documentElement.lang = FL.language === "zh" ? "zh-Hans" : "en";
    for (const node of document.querySelectorAll("[data-t]")) node.textContent = FL.say(node.dataset.t);
    for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", FL.say(node.dataset.tLabel));
    for (const node of document.querySelectorAll("[data-t-hint]")) node.placeholder = FL.say(node.dataset.tHint);
    document.getElementById("language").lang = FL.language === "zh" ? "en" : "zh-Hans";
  };
})();
