// How each kind of bytes looks in every picture: Okabe and Ito's colours, with lines of its own on a tile of 8 by 8.
export const LOOKS = {
  parameters: ["#0072B2", ""],
  gradients: ["#009E73", ""],
  optimizer: ["#999999", "M1 2h1.6M5 6h1.6"],
  inputs: ["#DDDDDD", ""],
  representations: ["#CC79A7", "M-1 9L9-1M-1 1L1-1M7 9L9 7"],
  cache: ["#F0E442", "M-1-1L9 9M7-1L9 1M-1 7L1 9"],
  loss: ["#D55E00", "M-1-1L9 9M-1 9L9-1"],
  activations: ["#56B4E9", ""],
  "random states": ["#FFFFFF", "M2 0V8M6 0V8"],
  other: ["#E69F00", "M0 2H8M0 6H8"],
};

export const escaped = (text) => String(text).replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`);
export const tile = (id, [color, lines]) => `<pattern id="${id}" width="8" height="8" patternUnits="userSpaceOnUse">`
  + `<rect width="8" height="8" fill="${color}"/><path d="${lines}" stroke="#1a1a1a" stroke-width=".8"/></pattern>`;
