// What is served, and which of it is chosen: one model, or two side by side.

import { get } from './api.js';
import { $, h, number, remembered } from './dom.js';
import { showDefaults } from './settings.js';

let models = [];

export const modelNamed = (name) => models.find((model) => model.name === name);
export const chosenModel = () => modelNamed($('model').value);
export const otherModel = () => modelNamed($('other').value);
export const chosenModels = () => [chosenModel(), otherModel()].filter(Boolean);

/** Return whether both models, by name, give the same ids to texts. */
export function sameTokens(one, another) {
  const [a, b] = [modelNamed(one), modelNamed(another)];
  return Boolean(a?.vocabulary && a.vocabulary === b?.vocabulary);
}

/** Ask the server what it serves, and let people choose. Throws Failure. */
export async function loadModels() {
  models = (await get('/page/models')).models;
  const wanted = $('model').value || remembered.get('model');
  $('model').replaceChildren(...models.map((model) => h('option', { value: model.name }, described(model))));
  if (modelNamed(wanted)) $('model').value = wanted;
  modelChanged();
}

/** Show what follows from the chosen model. */
export function modelChanged() {
  const model = chosenModel();
  if (!model) return;
  remembered.set('model', model.name);
  const before = $('other').value || remembered.get('other');
  const others = models.filter((other) => other.name !== model.name);
  $('other').replaceChildren(
    h('option', { value: '' }, 'No other'),
    ...others.map(({ name }) => h(
      'option',
      { value: name },
      name + (sameTokens(model.name, name) ? '' : ' (other tokenizer)'),
    )),
  );
  if (others.some((other) => other.name === before)) $('other').value = before;
  $('other-field').hidden = !others.length;
  $('attach').hidden = model.images === false;
  showDefaults(model);
  $('about-model').textContent = aboutModel(model);
}

function described(model) {
  const marks = [model.images ? 'images' : '', model.reasoning ? 'reasoning' : ''].filter(Boolean);
  return model.name + (marks.length ? ` (${marks.join(', ')})` : '');
}

function aboutModel(model) {
  if (model.chat === false) return `${model.name} has no chat template, so it cannot be talked to. Use /v1/completions.`;
  const about = model.about ?? {};
  const facts = [
    about.parameters ? `${number(about.parameters / 1e6)} million parameters` : '',
    about.bits_per_weight ? `${number(about.bits_per_weight, 1)} bits per weight` : about.precision,
    model.context_tokens ? `a context of ${number(model.context_tokens)} tokens` : '',
  ];
  return [model.name, ...facts.filter(Boolean)].join(' · ');
}
