// Runs cases in headless Chromium, each in a page of its own, and notes what the page logs.
import { createReadStream, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { extname, join, normalize } from 'node:path';
import puppeteer from 'puppeteer-core';

const [given, answers] = process.argv.slice(2);
const { folder, cases, chromium, environment } = JSON.parse(readFileSync(given, 'utf8'));
const here = import.meta.dirname;
const types = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript', '.wasm': 'application/wasm' };
const places = { '/models/': folder, '/': here };

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, 'http://localhost').pathname));
  const start = Object.keys(places).find((prefix) => path.startsWith(prefix));
  const file = join(places[start], path.slice(start.length));
  const size = statSync(file, { throwIfNoEntry: false })?.isFile() ? statSync(file).size : null;
  if (size === null) return response.writeHead(404).end();
  response.writeHead(200, { 'Content-Type': types[extname(file)] ?? 'application/octet-stream', 'Content-Length': size });
  createReadStream(file).pipe(response);
}).listen(0, '127.0.0.1');
await new Promise((ready) => server.once('listening', ready));
const base = `http://127.0.0.1:${server.address().port}`;

// The software adapter: no machine that runs tests has to have a GPU.
const flags = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'];
if (process.getuid?.() === 0) flags.push('--no-sandbox');
const browser = await puppeteer.launch({
  executablePath: chromium, args: flags, protocolTimeout: 3_600_000, env: { ...process.env, ...environment },
});

const found = {};
for (const one of cases) {
  const page = await browser.newPage();
  const logged = [];
  page.on('console', (message) => logged.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => logged.push(`error: ${error}`));
  try {
    await page.goto(`${base}/page.html`);
    found[one.name] = await page.evaluate((asked) => window.answer(asked), one);
  } catch (error) {
    found[one.name] = { error: String(error?.message ?? error) };
  }
  found[one.name].logged = logged;
  await page.close();
}
await browser.close();
server.close();
server.closeAllConnections();
writeFileSync(answers, JSON.stringify(found));
