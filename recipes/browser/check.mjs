// Looks at a page in headless Chromium: at the width of a desk and of a phone, light and dark, and as on paper.
//
//     node recipes/browser/check.mjs PAGE.html FOLDER
//
// Fails for an error on the console, a request that leaves the page, a link that leads nowhere, a page wider than the
// screen, and serious or critical findings of axe-core. Screenshots and a PDF go to FOLDER.
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [page_path, folder] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const address = pathToFileURL(resolve(page_path)).href;
const wrong = [];
mkdirSync(folder, { recursive: true });
const executablePath = await chromium.executablePath();
const browser = await puppeteer.launch({ args: chromium.args, executablePath, headless: "shell" });
const views = [["desk", 1280, "light"], ["desk-dark", 1280, "dark"], ["phone", 390, "light"], ["phone-dark", 390, "dark"]];
for (const [name, width, scheme] of views) {
  const page = await browser.newPage();
  page.on("console", (message) => message.type() === "error" && wrong.push(`${name}: console: ${message.text()}`));
  page.on("pageerror", (error) => wrong.push(`${name}: ${error}`));
  page.on("request", (asked) => {
    if (asked.url() !== address && !asked.url().startsWith("data:")) wrong.push(`${name}: request of ${asked.url()}`);
  });
  await page.setViewport({ width, height: 900, deviceScaleFactor: 1 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(address, { waitUntil: "load", timeout: 300000 });
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
  wrong.push(...(await page.evaluate((where) => {
    const found = [];
    for (const link of document.querySelectorAll("a[href]")) {
      const target = link.getAttribute("href");
      if (!target.startsWith("#") || !document.getElementById(target.slice(1))) found.push(`${where}: link to ${target}`);
    }
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) found.push(`${where}: ${root.scrollWidth} wide, shown ${root.clientWidth}`);
    return found;
  }, name)));
  await page.evaluate(`document.querySelectorAll("details").forEach((fold) => (fold.open = true)); ${axe}`);
  const { violations, passes } = await page.evaluate("axe.run()");
  for (const finding of violations.filter((each) => ["serious", "critical"].includes(each.impact)))
    wrong.push(`${name}: axe ${finding.id}: ${finding.help}: ${finding.nodes.slice(0, 3).map((node) => node.html.slice(0, 120)).join(" ")}`);
  console.log(`${name}: ${passes.length} rules of axe-core hold, ${violations.length} do not`);
  if (name === "desk") await page.pdf({ path: `${folder}/paper.pdf`, format: "A4" });
  await page.close();
}
await browser.close();
wrong.forEach((line) => console.error(line));
process.exit(wrong.length ? 1 : 0);
