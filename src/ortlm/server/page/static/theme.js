// Not a module, so that it runs before anything is drawn.
document.documentElement.dataset.theme = (() => {
  try {
    return localStorage.getItem('ortlm.theme') ?? '';
  } catch {
    return '';
  }
})();
