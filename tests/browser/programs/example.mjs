// Uses the page of examples/browser as a person does, and tells what it showed.
import { readFileSync, writeFileSync } from 'node:fs';
import puppeteer from 'puppeteer-core';

const [given, answers] = process.argv.slice(2);
const { url, chromium, device, prompt, tokens, stopped, shot } = JSON.parse(readFileSync(given, 'utf8'));
const flags = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'];
if (process.getuid?.() === 0) flags.push('--no-sandbox');
const browser = await puppeteer.launch({ executablePath: chromium, args: flags, protocolTimeout: 1_200_000 });
const page = await browser.newPage();
await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: stopped ? 'dark' : 'light' }]);
const logged = [];
page.on('console', (message) => logged.push(`${message.type()}: ${message.text()}`));
page.on('pageerror', (error) => logged.push(`error: ${error}`));
const shown = (id) => page.$eval(`#${id}`, (element) => element.textContent);
await page.goto(url);
await page.waitForFunction(() => document.getElementById('device').options.length > 0);
await page.select('#device', device);
await page.$eval('#prompt', (element, text) => { element.value = text; }, prompt);
await page.$eval('#tokens', (element, count) => { element.value = count; }, tokens);
await page.click('#run');
if (stopped) {
  await page.waitForFunction(() => document.getElementById('answer').textContent !== '', { timeout: 600_000 });
  await page.click('#stop');
}
await page.waitForFunction(() => !document.getElementById('run').disabled, { timeout: 600_000 });
const found = { answer: await shown('answer'), status: await shown('status'), logged };
if (shot) await page.screenshot({ path: shot });
await browser.close();
writeFileSync(answers, JSON.stringify(found));
