// A run's answers, example by example, decoded when they are asked for.

// A run's decoded columns: right(i), truth(i) (more is better), label(i), answer(i).
function decoded(cell) {
  const own = cell.examples;
  const shared = report.example_sets[own.set];
  const readers = {
    label: labelReader,
    labels: labelSetReader,
    right: rightReader,
    number: numberReader,
    tokens: tokenReader,
  };
  return { size: shared.size, kind: shared.kind, row: rowReader(shared), ...readers[shared.kind](shared, own) };
}

function rowReader(shared) {
  if (!shared.rows) return (i) => i * report.example_stride;
  const rows = unpack("I", shared.rows);
  return (i) => rows[i];
}

function labelReader(shared, own) {
  const label = unpack(shared.width, shared.label);
  const answer = unpack(shared.width, own.answer);
  const [confidence, truth] = [unpack("B", own.confidence), unpack("B", own.truth)];
  const name = (index) => shared.names[index] ?? `label ${index}`;
  return {
    right: (i) => label[i] === answer[i],
    truth: (i) => truth[i] / 255,
    label: (i) => name(label[i]),
    answer: (i) => [name(answer[i]), (confidence[i] / 255).toFixed(2)],
    measure: "probability of the right label",
  };
}

function labelSetReader(shared, own) {
  const wide = Math.ceil(shared.count / 8);
  const [label, answer, loss] = [unpack("B", shared.label), unpack("B", own.answer), unpack("H", own.loss)];
  const names = (bytes, i) => {
    const given = [];
    for (let k = 0; k < shared.count; k++) {
      if ((bytes[i * wide + (k >> 3)] >> (k & 7)) & 1) given.push(shared.names[k] ?? `label ${k}`);
    }
    return given.join(", ") || "none";
  };
  return {
    right: (i) => bytesEqual(label, answer, i * wide, wide),
    truth: (i) => -loss[i] * own.loss_step,
    label: (i) => names(label, i),
    answer: (i) => [names(answer, i), `loss ${formatScore(loss[i] * own.loss_step)}`],
    measure: "loss",
  };
}

function bytesEqual(one, other, from, count) {
  for (let k = from; k < from + count; k++) if (one[k] !== other[k]) return false;
  return true;
}

function rightReader(_shared, own) {
  const [right, loss] = [unpack("B", own.right), unpack("H", own.loss)];
  return {
    right: (i) => right[i] === 1,
    truth: (i) => -loss[i] * own.loss_step,
    label: () => NOTHING,
    answer: (i) => [right[i] ? "right" : "wrong", `loss ${formatScore(loss[i] * own.loss_step)}`],
    measure: "loss",
  };
}

function numberReader(shared, own) {
  const [label, answer] = [unpack("f", shared.label), unpack("f", own.answer)];
  return {
    right: null,
    truth: (i) => -Math.abs(answer[i] - label[i]),
    label: (i) => formatScore(label[i]),
    answer: (i) => [formatScore(answer[i]), `off by ${formatScore(Math.abs(answer[i] - label[i]))}`],
    measure: "absolute error",
  };
}

function tokenReader(shared, own) {
  const [tokens, correct, loss] = [
    unpack(shared.width, shared.tokens),
    unpack(shared.width, own.correct),
    unpack("H", own.loss),
  ];
  return {
    right: (i) => correct[i] === tokens[i],
    truth: (i) => -loss[i] * own.loss_step,
    label: (i) => plural(tokens[i], "token"),
    answer: (i) => [`${correct[i]} right`, `loss ${formatScore(loss[i] * own.loss_step)}`],
    measure: "mean loss of its tokens",
  };
}
