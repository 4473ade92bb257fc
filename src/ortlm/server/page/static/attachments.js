// The images of the message that is being written, as data: URLs.

import { $, button, cross, h, toast } from './dom.js';
import { chosenModel } from './models.js';

const MOST_BYTES = 16 << 20;
let images = [];

export const attached = () => images;

export function clearImages() {
  images = [];
  show();
}

export async function addImages(files) {
  if (chosenModel()?.images === false) {
    toast(`${chosenModel().name} is a model of text and takes no images.`);
    return;
  }
  for (const file of files) {
    if (!/^image\/(png|jpeg|webp|gif)$/.test(file.type)) toast(`${file.name} is no PNG, JPEG, WebP or GIF.`);
    else if (file.size > MOST_BYTES) toast(`${file.name} is larger than 16 MB.`);
    else images = [...images, await dataUrl(file)];
  }
  show();
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

function show() {
  $('images').replaceChildren(...images.map((url, at) => {
    const gone = button(cross(), () => {
      images = images.filter((_, other) => other !== at);
      show();
      $('message').focus();
    }, { class: 'icon', 'aria-label': `Remove image ${at + 1}` });
    return h('li', {}, h('img', { src: url, alt: `Image ${at + 1}` }), gone);
  }));
}
