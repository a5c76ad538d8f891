//! `cargo xtask bench ops`: a training step's operators by kind, their number, operations, bytes and time, ours beside those of
//! transformers with PEFT, from the traces that `benches/examples/peers.rs` has made of the same steps.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cmd;

const KINDS: [Kind; 8] = [
    Kind::Products,
    Kind::Attention,
    Kind::Losses,
    Kind::Elementwise,
    Kind::Optimizer,
    Kind::Copies,
    Kind::Other,
    Kind::Between,
];

/// What an operator is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Products,
    Attention,
    Losses,
    Elementwise,
    Optimizer,
    Copies,
    /// Views, memory, autograd's own work.
    Other,
    /// When no operator runs.
    Between,
}

impl Kind {
    fn title(self) -> &'static str {
        match self {
            Self::Products => "matrix products",
            Self::Attention => "attention",
            Self::Losses => "losses over the vocabulary",
            Self::Elementwise => "norms, activations, rotary, sums",
            Self::Optimizer => "optimizer",
            Self::Copies => "copies and casts",
            Self::Other => "other: views, memory, autograd",
            Self::Between => "between operators",
        }
    }

    /// By an operator's name; what else is done to numbers for every word is for the losses.
    fn of(event: &Event, vocab_size: i64) -> Self {
        let is_logits = |input: &Input| input.dims.len() > 1 && input.dims.last() == Some(&vocab_size);
        match Self::named(event) {
            Self::Elementwise | Self::Copies if event.inputs.iter().any(is_logits) => Self::Losses,
            kind => kind,
        }
    }

    fn named(event: &Event) -> Self {
        let name = event.name.rsplit("::").next().unwrap_or_default();
        let base = name.trim_end_matches('_').trim_end_matches("_data").trim_end_matches("_backward");
        let is_one_of = |names: &str| names.split(' ').any(|other| other == base || other == name);
        if event.name.starts_with("Optimizer.") || name.starts_with("_foreach") || base == "_fused_adamw" {
            Self::Optimizer
        } else if is_one_of(PRODUCTS) {
            Self::Products
        } else if name.contains("scaled_dot_product") || base == "attention" {
            Self::Attention
        } else if is_one_of(LOSSES) {
            Self::Losses
        } else if is_one_of(ELEMENTWISE) {
            Self::Elementwise
        } else if is_one_of(COPIES) {
            Self::Copies
        } else {
            Self::Other
        }
    }
}

// Names without what stands around them: `aten::`, `_backward`, the `_` of what is done in place.
const PRODUCTS: &str = "mm addmm bmm baddbmm matmul linear conv2d convolution";
const LOSSES: &str =
    "cross_entropy kl_divergence cross_entropy_loss nll_loss nll_loss_nd nll_loss_forward _log_softmax log_softmax";
const ELEMENTWISE: &str = "rms_norm swiglu rotate layer_norm native_layer_norm _fused_rms_norm add sub rsub mul div neg pow square sqrt \
    rsqrt reciprocal mean sum silu gelu sigmoid tanh exp log cos sin _softmax softmax abs clamp clamp_min linalg_vector_norm \
    cosine_similarity addcmul addcdiv norm";
const COPIES: &str = "copy clone _to_copy to contiguous cat stack fill zero index index_select index_put index_add embedding \
    embedding_dense gather scatter repeat where masked_fill constant_pad_nd slice_backward select_backward";

/// One operator as it was called.
#[derive(Debug)]
struct Event {
    name: String,
    /// Of the thread.
    thread: i64,
    /// Microseconds.
    start: f64,
    end: f64,
    inputs: Vec<Input>,
}

/// What it was given.
#[derive(Debug)]
struct Input {
    /// Empty where it is no tensor; of lists of tensors, which the optimizer is given, none are told.
    dims: Vec<i64>,
    /// Bytes of a number, 0 where it is no tensor.
    size: i64,
    /// As text, where it is a number or a list of numbers.
    value: String,
}

impl Input {
    fn numel(&self) -> i64 {
        if self.size == 0 { 0 } else { self.dims.iter().product() }
    }
}

/// What a trace of PyTorch's profiler tells of operators, in the order of their starts.
fn events(trace: &Value) -> Result<Vec<Event>> {
    let all = trace["traceEvents"].as_array().context("no traceEvents")?;
    let mut events = Vec::new();
    for event in all {
        let is_operator = ["cpu_op", "user_annotation"].iter().any(|cat| event["cat"] == *cat);
        if event["ph"] != "X" || !is_operator {
            continue;
        }
        let (args, start) = (&event["args"], event["ts"].as_f64().context("an operator without its start")?);
        let list = |key: &str| args[key].as_array().map_or(&[][..], Vec::as_slice);
        let (types, values) = (list("Input type"), list("Concrete Inputs"));
        let mut inputs = Vec::new();
        for (i, dims) in list("Input Dims").iter().enumerate() {
            let text = |list: &[Value]| list.get(i).and_then(Value::as_str).unwrap_or_default().to_owned();
            let dims = dims.as_array().map_or(&[][..], Vec::as_slice).iter().filter_map(Value::as_i64).collect();
            inputs.push(Input { dims, size: size_of(&text(types)), value: text(values) });
        }
        events.push(Event {
            name: event["name"].as_str().context("an operator without a name")?.to_owned(),
            thread: event["tid"].as_i64().unwrap_or_default(),
            start,
            end: start + event["dur"].as_f64().context("an operator without its time")?,
            inputs,
        });
    }
    events.sort_by(|a, b| (a.thread, a.start, -a.end).partial_cmp(&(b.thread, b.start, -b.end)).expect("no NaN"));
    Ok(events)
}

/// Bytes of a number of a type as the profiler names it, 0 for what is no tensor.
fn size_of(kind: &str) -> i64 {
    match kind {
        "double" | "long int" => 8,
        "float" | "int" => 4,
        "c10::BFloat16" | "c10::Half" | "short int" => 2,
        "bool" | "unsigned char" | "signed char" => 1,
        _ => 0,
    }
}

/// Multiplications and additions of an operator, of matrix products and attention alone; a score's way back is computed with
/// the score once more, five products to the way there's two.
fn flop(event: &Event) -> i64 {
    let dims = |i: usize| event.inputs.get(i).map_or(&[][..], |input| &input.dims);
    let number = |i: usize| event.inputs.get(i).and_then(|input| input.value.parse::<i64>().ok()).unwrap_or_default();
    let product = |a: &[i64], b: &[i64]| 2 * a.iter().product::<i64>() * b.last().copied().unwrap_or_default();
    let attention = |q: &[i64], k: &[i64]| match (q, k) {
        ([batch, heads, queries, dim], [_, _, keys, _]) => 2 * batch * heads * queries * keys * dim,
        _ => 0,
    };
    let own = || match dims(0) {
        [_, heads, _, dim] => 2 * heads * dim * number(3),
        _ => 0,
    };
    match event.name.as_str() {
        "aten::mm" | "aten::bmm" => product(dims(0), dims(1)),
        "aten::addmm" | "aten::addmm_" | "aten::baddbmm" => product(dims(1), dims(2)),
        // Steps as wide as the kernel: what cuts pictures into patches.
        "aten::convolution" => match (dims(0), dims(1)) {
            ([batch, channels, height, width], [out, _, h, w]) => {
                2 * batch * out * channels * (height / h * h) * (width / w * w)
            }
            _ => 0,
        },
        "aten::convolution_backward" => {
            let wanted = event
                .inputs
                .last()
                .map_or(0, |mask| mask.value.split(',').take(2).filter(|w| w.contains("True")).count());
            2 * dims(0).iter().product::<i64>() * dims(2).iter().skip(1).product::<i64>() * wanted as i64
        }
        "aten::_scaled_dot_product_flash_attention_for_cpu" => 2 * attention(dims(0), dims(1)),
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward" => 5 * attention(dims(1), dims(2)),
        "vora::attention" => 2 * own(),
        "vora::attention_backward" => 5 * own(),
        _ => 0,
    }
}

/// What an operator is given, and what it makes where shapes tell: a product's own, elsewhere as much as its largest input.
fn bytes(event: &Event, kind: Kind) -> i64 {
    let given = |input: &Input| input.numel() * input.size;
    let largest = event.inputs.iter().map(given).max().unwrap_or_default();
    let size = event.inputs.iter().map(|input| input.size).max().unwrap_or_default();
    let made = match (event.name.as_str(), kind) {
        ("aten::mm" | "aten::addmm" | "aten::addmm_" | "aten::bmm" | "aten::baddbmm", _) => {
            let inner =
                event.inputs.iter().rev().find(|input| input.dims.len() > 1).map_or(1, |b| b.dims[b.dims.len() - 2]);
            flop(event) / 2 / inner.max(1) * size
        }
        (_, Kind::Other) => return 0, // looks at nothing but shapes
        ("vora::attention_backward", _) => event.inputs.iter().take(3).map(given).sum(),
        ("vora::swiglu_backward", _) => 2 * largest,
        (name, _) if name.ends_with('_') => 0,
        _ => largest,
    };
    event.inputs.iter().map(given).sum::<i64>() + made
}

/// An operator's share of a step: its time without that of the operators it called, which stand for themselves.
#[derive(Debug, Clone, PartialEq)]
struct Share {
    name: String,
    kind: Kind,
    /// 1 where it is counted, which one that only calls others is not.
    number: u64,
    flop: i64,
    bytes: i64,
    microseconds: f64,
}

/// The shares of a step's operators, and last of the time between them.
fn shares(events: &[Event], vocab_size: i64) -> Vec<Share> {
    let Some(first) = events.first() else { return Vec::new() };
    let (mut shares, mut open) = (Vec::<Share>::new(), Vec::<(usize, usize)>::new()); // event, its share
    let (mut between, mut last) = (0.0, first.start);
    for (i, event) in events.iter().enumerate().filter(|(_, event)| event.thread == first.thread) {
        while open.last().is_some_and(|(parent, _)| events[*parent].end <= event.start) {
            open.pop();
        }
        let parent = open.last().copied();
        if parent.is_some_and(|(parent, _)| is_whole(&events[parent].name)) {
            continue; // its time is its caller's
        }
        let own = Kind::of(event, vocab_size);
        let kind = match parent.map(|(_, at)| shares[at].kind) {
            Some(kind @ (Kind::Attention | Kind::Optimizer)) => kind,
            _ => own,
        };
        if let Some((parent, at)) = parent {
            let caller = &mut shares[at];
            caller.microseconds -= event.end.min(events[parent].end) - event.start;
            (caller.number, caller.bytes) = (0, 0);
        } else {
            between += (event.start - last).max(0.0);
            last = event.end;
        }
        open.push((i, shares.len()));
        shares.push(Share {
            name: event.name.clone(),
            kind,
            number: 1,
            flop: flop(event),
            bytes: bytes(event, own),
            microseconds: event.end - event.start,
        });
    }
    let name = String::new();
    shares.push(Share { name, kind: Kind::Between, number: 0, flop: 0, bytes: 0, microseconds: between });
    shares
}

/// Whether an operator stands for all that it calls.
fn is_whole(name: &str) -> bool {
    const WHOLE: &str = "mm addmm addmm_ bmm baddbmm convolution convolution_backward _fused_adamw_ native_layer_norm \
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward";
    name.starts_with("vora::") || name.strip_prefix("aten::").is_some_and(|name| WHOLE.split(' ').any(|w| w == name))
}

/// One step of several that were traced: of each operator the least time. The profiler's clock runs on while other programs
/// have the core, so that the machine has to be quiet for what takes milliseconds.
///
/// # Errors
/// Steps that are not of the same operators.
fn least(steps: Vec<Vec<Share>>) -> Result<Vec<Share>> {
    let mut steps = steps.into_iter();
    let mut least = steps.next().context("no step was traced")?;
    for step in steps {
        ensure!(step.len() == least.len(), "steps of {} and {} operators", least.len(), step.len());
        for (least, other) in least.iter_mut().zip(step) {
            ensure!(least.name == other.name, "{} in one step is {} in another", least.name, other.name);
            least.microseconds = least.microseconds.min(other.microseconds);
        }
    }
    Ok(least)
}

/// Sums over operators.
#[derive(Debug, Default, Clone, Serialize)]
struct Sum {
    number: u64,
    gflop: f64,
    gigabytes: f64,
    milliseconds: f64,
}

impl Sum {
    fn of<'a>(shares: impl Iterator<Item = &'a Share>) -> Self {
        let mut sum = Self::default();
        for share in shares {
            sum.number += share.number;
            sum.gflop += share.flop as f64 / 1e9;
            sum.gigabytes += share.bytes as f64 / 1e9;
            sum.milliseconds += share.microseconds / 1e3;
        }
        sum
    }
}

/// What `benches/examples/peers.rs` says of its traces.
#[derive(Debug, Deserialize)]
struct Traced {
    tokens: u64,
    dtype: String,
    batch: u64,
    vocab_size: i64,
    gflop: f64,
    sides: Vec<Side>,
}

#[derive(Debug, Deserialize)]
struct Side {
    name: String,
    traces: Vec<PathBuf>,
}

/// A step of one side.
#[derive(Debug, Serialize)]
struct Step {
    tokens: u64,
    dtype: String,
    batch: u64,
    name: String,
    /// Operations that it cannot do without.
    gflop: f64,
    kinds: Vec<(Kind, Sum)>,
    /// By name, the longest first.
    operators: Vec<(String, Kind, Sum)>,
}

impl Step {
    fn new(traced: &Traced, side: &Side, shares: &[Share]) -> Self {
        let sum = |kind| Sum::of(shares.iter().filter(|share| share.kind == kind));
        let mut names: Vec<_> = shares.iter().map(|share| (share.name.clone(), share.kind)).collect();
        names.sort_by(|a, b| (&a.0, a.1 as usize).cmp(&(&b.0, b.1 as usize)));
        names.dedup();
        let of = |name: &str, kind| Sum::of(shares.iter().filter(|share| share.name == name && share.kind == kind));
        let mut operators: Vec<_> = names.into_iter().map(|(name, kind)| (of(&name, kind), name, kind)).collect();
        operators.sort_by(|a, b| b.0.milliseconds.total_cmp(&a.0.milliseconds));
        Self {
            tokens: traced.tokens,
            dtype: traced.dtype.clone(),
            batch: traced.batch,
            name: side.name.clone(),
            gflop: traced.gflop,
            kinds: KINDS.into_iter().map(|kind| (kind, sum(kind))).collect(),
            operators: operators.into_iter().map(|(sum, name, kind)| (name, kind, sum)).collect(),
        }
    }

    fn total(&self) -> Sum {
        self.kinds.iter().fold(Sum::default(), |sum, (_, other)| Sum {
            number: sum.number + other.number,
            gflop: sum.gflop + other.gflop,
            gigabytes: sum.gigabytes + other.gigabytes,
            milliseconds: sum.milliseconds + other.milliseconds,
        })
    }
}

/// Traces steps of all sides, unless `plot`, with `args` for the example; then writes `ops.md` and `ops.json` into `out`.
pub fn run(out: &Path, plot: bool, args: &[String]) -> Result<()> {
    if !plot {
        let mut example = super::peers_into(out)?;
        if !args.iter().any(|arg| arg.starts_with("--traces")) {
            example.args(["--traces", "5"]);
        }
        cmd::run(example.args(args).env("KINETO_LOG_LEVEL", "99"))?; // it tells of the GPU that it does not find
    }
    let mut steps = Vec::new();
    for traced in read::<Vec<Traced>>(&out.join("traces.json"))? {
        for side in &traced.sides {
            let read = |path: &PathBuf| Ok(shares(&events(&read(path)?)?, traced.vocab_size));
            let shares = side.traces.iter().map(read).collect::<Result<Vec<_>>>().and_then(least);
            steps.push(Step::new(&traced, side, &shares.with_context(|| format!("the traces of {}", side.name))?));
        }
    }
    let json = out.join("ops.json");
    let write =
        |path: &Path, text: String| fs::write(path, text).with_context(|| format!("cannot write {}", path.display()));
    write(&json, serde_json::to_string_pretty(&steps)?)?;
    let text = tables(&steps);
    println!("{text}");
    write(&json.with_extension("md"), text)?;
    println!("{} and ops.md beside it", cmd::shown(&json));
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// A table for each size of picture.
fn tables(steps: &[Step]) -> String {
    let mut text = String::new();
    for steps in steps.chunk_by(|a, b| a.tokens == b.tokens) {
        let first = &steps[0];
        text += &format!(
            "A step of {} samples of {} picture tokens, {}; {:.1} GFLOP that it cannot do without\n\n",
            first.batch, first.tokens, first.dtype, first.gflop
        );
        let mut table = Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(["", "", "operators", "GFLOP", "GB", "ms", "GFLOP/s"]);
        let mut row = |title: &str, name: &str, sum: &Sum| {
            let speed =
                if sum.gflop > 0.0 { format!("{:.0}", sum.gflop / sum.milliseconds * 1e3) } else { String::new() };
            let [gflop, bytes, ms] = [sum.gflop, sum.gigabytes, sum.milliseconds].map(|x| format!("{x:.2}"));
            table.add_row([title.to_owned(), name.to_owned(), sum.number.to_string(), gflop, bytes, ms, speed]);
        };
        for (i, kind) in KINDS.iter().enumerate() {
            steps.iter().for_each(|step| row(kind.title(), &step.name, &step.kinds[i].1));
        }
        steps.iter().for_each(|step| row("a step", &step.name, &step.total()));
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text += &format!("{table}\n\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const VOCAB: i64 = 100;

    fn event(name: &str, ts: f64, dur: f64, dims: Value, types: Value, values: Value) -> Value {
        let args = json!({ "Input Dims": dims, "Input type": types, "Concrete Inputs": values });
        json!({ "ph": "X", "cat": "cpu_op", "name": name, "tid": 7, "ts": ts, "dur": dur, "args": args })
    }

    fn bf16(name: &str, ts: f64, dur: f64, dims: &[&[i64]]) -> Value {
        let none = vec![""; dims.len()];
        event(name, ts, dur, json!(dims), json!(vec!["c10::BFloat16"; dims.len()]), json!(none))
    }

    fn shares_of(events: &[Value]) -> Vec<Share> {
        shares(&super::events(&json!({ "traceEvents": events })).unwrap(), VOCAB)
    }

    #[test]
    fn time_belongs_to_the_innermost_operator() {
        let other = json!({ "ph": "X", "cat": "overhead", "name": "buffer", "tid": 7, "ts": 0.0, "dur": 900.0 });
        let shares = shares_of(&[
            bf16("aten::linear", 10.0, 50.0, &[&[4, 8], &[16, 8]]),
            bf16("aten::t", 11.0, 2.0, &[&[16, 8]]),
            bf16("aten::mm", 15.0, 40.0, &[&[4, 8], &[8, 16]]),
            bf16("aten::copy_", 20.0, 5.0, &[&[4, 8], &[4, 8]]), // of the product, which stands for it
            bf16("aten::add", 64.0, 3.0, &[&[4, 16], &[4, 16]]),
            other,
        ]);
        let found: Vec<_> = shares.iter().map(|s| (s.name.as_str(), s.kind, s.number, s.microseconds)).collect();
        assert_eq!(
            found,
            [
                ("aten::linear", Kind::Products, 0, 8.0),
                ("aten::t", Kind::Other, 1, 2.0),
                ("aten::mm", Kind::Products, 1, 40.0),
                ("aten::add", Kind::Elementwise, 1, 3.0),
                ("", Kind::Between, 0, 4.0),
            ]
        );
        let total = Sum::of(shares.iter());
        assert!((total.milliseconds - 0.057).abs() < 1e-9, "{total:?}"); // all from the first start to the last end
        assert_eq!((shares[2].flop, shares[2].bytes), (2 * 4 * 8 * 16, 2 * (4 * 8 + 8 * 16 + 4 * 16)));
        assert_eq!((shares[1].bytes, shares[3].bytes), (0, 2 * 3 * 64));
    }

    #[test]
    fn kinds_follow_names_callers_and_the_vocabulary() {
        let step = json!({ "ph": "X", "cat": "user_annotation", "name": "Optimizer.step#AdamW.step", "tid": 7, "ts": 10.0, "dur": 9.0 });
        let shares = shares_of(&[
            step,
            bf16("aten::mul_", 11.0, 1.0, &[&[4]]),
            bf16("aten::mul", 20.0, 1.0, &[&[4]]),
            bf16("aten::copy_", 30.0, 1.0, &[&[3, VOCAB], &[3, VOCAB]]),
            bf16("aten::copy_", 32.0, 1.0, &[&[3, 4], &[3, 4]]),
            bf16("aten::mm", 34.0, 1.0, &[&[3, 4], &[4, VOCAB]]),
            bf16("vora::cross_entropy", 36.0, 1.0, &[&[3, VOCAB], &[]]),
            bf16("MmBackward0", 37.0, 0.8, &[&[3, VOCAB]]),
            bf16("aten::mm", 37.2, 0.2, &[&[3, VOCAB], &[VOCAB, 4]]),
            bf16("aten::slice", 38.0, 1.0, &[&[3, 4]]),
            bf16("aten::slice_backward", 40.0, 1.0, &[&[3, 4]]),
            bf16("vora::swiglu_backward", 42.0, 1.0, &[&[3, 4], &[3, 4], &[3, 4]]),
            bf16("autograd::engine::evaluate_function: MulBackward0", 44.0, 1.0, &[&[3, 4]]),
            bf16("aten::_scaled_dot_product_attention_math", 50.0, 9.0, &[&[1, 2, 3, 4]]),
            bf16("aten::bmm", 51.0, 2.0, &[&[2, 3, 4], &[2, 4, 3]]),
        ]);
        let kinds: Vec<_> = shares.iter().map(|share| share.kind).collect();
        use Kind::{Attention, Between, Copies, Elementwise, Losses, Optimizer, Other, Products};
        let expected = [
            Optimizer,
            Optimizer,
            Elementwise,
            Losses,
            Copies,
            Products,
            Losses,
            Other,
            Products,
            Other,
            Copies,
            Elementwise,
            Other,
            Attention,
            Attention,
            Between,
        ];
        assert_eq!(kinds, expected);
        assert_eq!(shares[14].flop, 2 * 2 * 3 * 4 * 3);
    }

    #[test]
    fn attention_counts_what_is_computed() {
        let own = |name| {
            let dims = json!([[2, 9, 10, 64], [2, 3, 10, 64], [2, 3, 10, 64], []]);
            event(name, 0.0, 1.0, dims, json!(["float", "float", "float", "Scalar"]), json!(["", "", "", "110"]))
        };
        let q: &[i64] = &[2, 9, 10, 64];
        let shares = shares_of(&[own("vora::attention")]);
        assert_eq!(shares[0].flop, 4 * 9 * 64 * 110);
        assert_eq!(shares_of(&[own("vora::attention_backward")])[0].flop, 10 * 9 * 64 * 110);
        let flash = "aten::_scaled_dot_product_flash_attention_for_cpu";
        assert_eq!(shares_of(&[bf16(flash, 0.0, 1.0, &[q, q, q])])[0].flop, 4 * 2 * 9 * 10 * 10 * 64);
        let back = format!("{flash}_backward");
        assert_eq!(shares_of(&[bf16(&back, 0.0, 1.0, &[q, q, q, q])])[0].flop, 10 * 2 * 9 * 10 * 10 * 64);
        assert_eq!(shares[0].bytes, 4 * (2 * 2 * 9 * 10 * 64 + 2 * 2 * 3 * 10 * 64)); // q, k, v, and as much as q
    }

    #[test]
    fn convolutions_count_the_gradients_that_are_wanted() {
        let forward = bf16("aten::convolution", 0.0, 1.0, &[&[2, 3, 28, 28], &[8, 3, 14, 14], &[8]]);
        let product = 2 * 2 * 8 * 4 * 3 * 14 * 14;
        assert_eq!(shares_of(&[forward])[0].flop, product);
        let dims = json!([[2, 8, 2, 2], [2, 3, 28, 28], [8, 3, 14, 14], []]);
        let types = json!(["float", "float", "float", ""]);
        let back = |mask: &str| {
            event("aten::convolution_backward", 0.0, 1.0, dims.clone(), types.clone(), json!(["", "", "", mask]))
        };
        assert_eq!(shares_of(&[back("[False, True, True]")])[0].flop, product);
        assert_eq!(shares_of(&[back("[True, True, False]")])[0].flop, 2 * product);
    }

    #[test]
    fn least_times_are_of_steps_of_the_same_operators() {
        let step = |name: &str, micros: f64| {
            shares_of(&[bf16(name, 0.0, micros, &[&[4]]), bf16("aten::mul", 9.0, 9.0 - micros, &[&[4]])])
        };
        let both = least(vec![step("aten::add", 2.0), step("aten::add", 5.0)]).unwrap();
        assert_eq!([both[0].microseconds, both[1].microseconds], [2.0, 4.0]);
        let error = least(vec![step("aten::add", 2.0), step("aten::sub", 5.0)]).unwrap_err().to_string();
        assert_eq!(error, "aten::add in one step is aten::sub in another");
    }
}
