// The artifact's quality report: what `ortlm evaluate` and the build's own check found.

import { get } from './api.js';
import { $, h, number } from './dom.js';

const bytes = (count) => {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, count)) / 3));
  return `${number(count / 1000 ** step, step ? 1 : 0)} ${units[step]}`;
};
const count = (value) => (value >= 1e9 ? `${number(value / 1e9, 2)} billion` : `${number(value / 1e6, 1)} million`);
const finite = (value) => typeof value === 'number' && Number.isFinite(value);

const ABOUT = [
  ['source', 'Made from', String],
  ['parameters', 'Parameters', count],
  ['precision', 'Precision', String],
  ['bits_per_weight', 'Bits per weight', (value) => number(value, 2)],
  ['output_bytes', 'Size', bytes],
  ['checkpoint_bytes', 'Size before', bytes],
  ['recipe', 'Weights', (value) => String(value).split('; ').join('\n')],
  ['kv_cache', 'KV cache', String],
  ['cache_bytes_per_token', 'Cache per token', bytes],
  ['target', 'Built for', String],
  ['built_with', 'Built with', String],
];

/** Show what is known of `models`, one after the other. */
export async function showQuality(models) {
  const place = $('quality-body');
  place.replaceChildren(h('p', {}, 'Loading …'));
  $('quality').showModal();
  try {
    const found = await Promise.all(models.map(({ name }) => get(`/page/quality?model=${encodeURIComponent(name)}`)));
    place.replaceChildren(...models.map((model, at) => section(model, found[at])));
  } catch (error) {
    place.replaceChildren(h('p', { class: 'error', role: 'alert' }, error.message));
  }
}

function section(model, { summary, check, report }) {
  const facts = ABOUT.filter(([name]) => model.about?.[name] !== undefined)
    .flatMap(([name, label, show]) => [h('dt', {}, label), h('dd', {}, show(model.about[name]))]);
  let measured;
  if (report) measured = fromReport(report);
  else if (summary) measured = fromSummary(summary);
  else if (check) measured = fromCheck(check);
  else {
    measured = [h(
      'p',
      {},
      'Nothing was measured. On the server, ',
      h('code', {}, `ortlm evaluate ${model.name}`),
      ' compares a model with the one that it was built from.',
    )];
  }
  return h('section', {}, h('h3', { class: 'model' }, model.name), ...measured, h('h4', {}, 'About it'), h('dl', { class: 'facts' }, ...facts));
}

const card = (label, value, more) => h('div', { class: 'card' }, h('span', {}, label), h('b', {}, value), h('span', {}, more ?? ''));
const shown = (figure, digits) => (finite(figure?.value) ? number(figure.value, digits) : '–');
const error = (figure, digits) => (finite(figure?.standard_error) ? `± ${number(figure.standard_error, digits)}` : '');

function fromReport(report) {
  const { statistics: found, text } = report;
  const size = finite(report.artifact?.bytes) && finite(report.reference?.bytes)
    ? `${number((100 * report.artifact.bytes) / report.reference.bytes)} % of the reference` : '';
  const cards = [
    card('Mean KL divergence', shown(found.kld, 4), `${error(found.kld, 4)} nats`),
    card('Top-1 agreement', `${shown(found.same_top, 1)} %`, error(found.same_top, 1)),
    card('Perplexity ratio', shown(found.ppl_ratio, 3), error(found.ppl_ratio, 3)),
    card('RMS change of p', `${shown(found.delta_p_rms, 2)} %`, error(found.delta_p_rms, 2)),
    card('99 % of tokens below', finite(found.kld_percentiles?.p99) ? number(found.kld_percentiles.p99, 3) : '–', 'KL divergence, nats'),
    ...(finite(report.artifact?.bytes) ? [card('Size', bytes(report.artifact.bytes), size)] : []),
  ];
  return [
    h(
      'p',
      { class: 'note' },
      `Against ${report.reference?.name ?? 'its reference'}, on ${number(found.scored_tokens ?? 0)} tokens of `
        + `${text?.name ?? 'a text'}${report.created ? `, ${report.created.slice(0, 10)}` : ''}. `
        + 'A KL divergence of 0: the same probabilities.',
    ),
    h('div', { class: 'cards' }, ...cards),
    ...domains(report.kinds),
    ...layers(report.layers),
  ];
}

function fromSummary(found) {
  const pair = (name) => ({ value: found[name], standard_error: found[`${name}_standard_error`] });
  return [
    h('p', { class: 'note' }, `Against ${found.reference ?? 'its reference'}, on ${number(found.scored_tokens ?? 0)} tokens of ${found.text ?? 'a text'}.`),
    h(
      'div',
      { class: 'cards' },
      card('Mean KL divergence', shown(pair('mean_kld'), 4), `${error(pair('mean_kld'), 4)} nats`),
      card('Top-1 agreement', `${shown(pair('same_top_percent'), 1)} %`, error(pair('same_top_percent'), 1)),
      card('Perplexity ratio', shown(pair('ppl_ratio'), 3), error(pair('ppl_ratio'), 3)),
    ),
  ];
}

function fromCheck(found) {
  const cards = [
    ...(finite(found.kld) ? [card('Mean KL divergence', number(found.kld, 4), 'nats')] : []),
    ...(finite(found.same_top) ? [card('Top-1 agreement', `${number(found.same_top, 1)} %`)] : []),
  ];
  return [
    h('p', { class: 'note' }, `The short check at the end of the build, on ${number(found.scored_tokens ?? 0)} tokens: too few to compare two builds.`),
    ...(cards.length ? [h('div', { class: 'cards' }, ...cards)] : []),
    ...(found.continuation ? [h('p', { class: 'sample' }, found.prompt, h('mark', {}, found.continuation))] : []),
  ];
}

function domains(kinds) {
  if (!Array.isArray(kinds) || kinds.length < 2) return [];
  const head = ['Domain', 'Tokens', 'Perplexity', 'Reference', 'Mean KLD', 'Top-1, %'];
  const rows = kinds.map((row) => [
    row.kind,
    number(row.tokens),
    shown(row.ppl, 2),
    shown(row.base_ppl, 2),
    shown(row.kld, 4),
    finite(row.same_top) ? number(row.same_top, 1) : '–',
  ]);
  return [h('h4', {}, 'By domain'), table(head, rows, 'By domain')];
}

function table(head, rows, label) {
  return h(
    'div',
    { class: 'wide', tabIndex: 0, role: 'group', 'aria-label': label },
    h(
      'table',
      {},
      h('thead', {}, h('tr', {}, ...head.map((text) => h('th', { scope: 'col' }, text)))),
      h('tbody', {}, ...rows.map(([first, ...rest]) =>
        h('tr', {}, h('th', { scope: 'row' }, first), ...rest.map((text) => h('td', {}, text))))),
    ),
  );
}

/** Bars of the signal-to-noise ratio of each layer's input. */
function layers(found) {
  const snr = found?.snr;
  if (!Array.isArray(snr) || !snr.some(finite)) return [];
  const most = Math.max(...snr.filter(finite));
  const bars = snr.map((value, at) => {
    const name = at === snr.length - 1 ? 'head' : String(at);
    const bar = h('span', { class: 'bar' });
    bar.style.setProperty('--share', `${finite(value) ? Math.max(1, (100 * value) / most) : 100}%`);
    const said = finite(value) ? `${number(value, 1)} dB` : 'no difference';
    return h('li', { title: `${name}: ${said}` }, bar, h('span', { class: 'hidden' }, `${name}: ${said}`));
  });
  return [
    h('h4', {}, 'Error by layer'),
    h('p', { class: 'note' }, `Signal-to-noise ratio of each layer's input, from ${number(snr.find(finite), 1)} dB in the first `
      + `to ${number(snr.filter(finite).at(-1), 1)} dB in the head. 6 dB less is an error twice as large.`),
    h('ol', { class: 'bars', 'aria-label': 'Signal-to-noise ratio by layer' }, ...bars),
  ];
}
