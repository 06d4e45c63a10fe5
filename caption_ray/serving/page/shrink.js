'use strict';
// Large pictures are made smaller before they are sent: a model looks at a few hundred pixels a
// side, and a phone's photo would take long to send, or be above the server's limit.

const LONGEST_SIDE = 2048;
// Tried one after the other until the file is below the server's limit: longest side, JPEG quality.
const ATTEMPTS = [[LONGEST_SIDE, .92], [LONGEST_SIDE, .85], [1536, .85], [1024, .85], [640, .85], [320, .8]];

// Sets the entry's `body`, which is sent, `source`, the address of what is shown, and `shrunk`.
// What the browser cannot decode is sent as it is: whether it can be captioned, the server decides.
async function prepare(entry) {
  const limit = info?.limits?.max_body_bytes ?? Infinity;
  const { file } = entry;
  URL.revokeObjectURL(entry.source);
  entry.source = URL.createObjectURL(file);
  entry.body = file;
  const image = await decode(entry.source);
  if (!image) {
    URL.revokeObjectURL(entry.source);
    entry.source = '';
  } else if (Math.max(image.naturalWidth, image.naturalHeight) > LONGEST_SIDE || file.size > limit) {
    const smaller = await shrink(file, limit).catch(() => null);
    if (smaller) {
      URL.revokeObjectURL(entry.source);
      entry.source = URL.createObjectURL(smaller);
      entry.body = smaller;
      entry.shrunk = true;
    }
  }
  entry.isPrepared = true;
}

// Few browsers show HEIC and TIFF; the answer is then null.
function decode(source) {
  return new Promise(done => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => done(null);
    image.src = source;
  });
}

async function shrink(file, limit) {
  // Upright, since the JPEG that is written has no note of its orientation.
  const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
  const canvas = make('canvas'), brush = canvas.getContext('2d');
  try {
    for (const [side, quality] of ATTEMPTS) {
      const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      // What is transparent becomes white, as on the server.
      brush.fillStyle = '#fff';
      brush.fillRect(0, 0, canvas.width, canvas.height);
      brush.imageSmoothingQuality = 'high';
      brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      const smaller = await new Promise(done => canvas.toBlob(done, 'image/jpeg', quality));
      if (smaller && smaller.size <= limit) return smaller;
    }
  } finally {
    bitmap.close();
  }
  return null;
}
