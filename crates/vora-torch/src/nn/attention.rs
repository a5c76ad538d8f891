//! Attention on the CPU that is told which keys each query attends to, and computes no others.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::ffi;

/// Queries of one row that stand together, and all that they attend to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Places of the queries in their row.
    pub queries: Range<i64>,
    /// The keys that they attend to; no key lies in two bands.
    pub bands: Vec<Band>,
}

/// Keys between two diagonals: query `q` attends to the `k` of `keys` with `q + first <= k <= q + last`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Band {
    /// Places of the keys in their row.
    pub keys: Range<i64>,
    /// The first key, counted from the query.
    pub first: i64,
    /// The last key, counted from the query.
    pub last: i64,
}

impl Band {
    /// Further away than any key.
    const FAR: i64 = 1 << 40;

    /// Every query attends to all of these keys.
    pub fn all(keys: Range<i64>) -> Self {
        Self { keys, first: -Self::FAR, last: Self::FAR }
    }

    /// Every query attends to those of these keys that do not come after it.
    pub fn causal(keys: Range<i64>) -> Self {
        Self { last: 0, ..Self::all(keys) }
    }

    /// The same without what lies further back than the key `first` counted from a query.
    #[must_use]
    pub fn from(self, first: i64) -> Self {
        Self { first, ..self }
    }
}

/// Which keys each query of a batch attends to, row by row.
#[derive(Debug)]
pub struct Bands {
    runs: Tensor,  // [n, 5] int64: row, first and end query, first and end band
    bands: Tensor, // [m, 4] int64: first and end key, first, last
    rows: i64,
    end_query: i64,
    end_key: i64,
}

impl Bands {
    /// The runs of each row, in the order of their queries; what no run holds attends to nothing and gets zeros.
    ///
    /// # Errors
    /// Queries that overlap or stand in another order, and keys that stand in two bands of a run.
    pub fn new(rows: &[Vec<Run>]) -> Result<Self> {
        let (mut runs, mut bands) = (Vec::new(), Vec::new());
        let (mut end_query, mut end_key) = (0, 0);
        for (row_idx, row) in rows.iter().enumerate() {
            let mut row_end = 0;
            for run in row {
                let (queries, first_band) = (&run.queries, bands.len() as i64 / 4);
                ensure!(
                    row_end <= queries.start && queries.start <= queries.end,
                    "queries {queries:?} of row {row_idx}"
                );
                row_end = queries.end;
                let mut of_run: Vec<&Band> = run.bands.iter().filter(|band| !band.keys.is_empty()).collect();
                of_run.sort_by_key(|band| band.keys.start);
                let mut keys_end = 0;
                for Band { keys, first, last } in of_run {
                    ensure!(keys_end <= keys.start, "keys {keys:?} of queries {queries:?} of row {row_idx}");
                    keys_end = keys.end;
                    bands.extend([keys.start, keys.end, (*first).max(-Band::FAR), (*last).min(Band::FAR)]);
                }
                end_key = end_key.max(keys_end);
                runs.extend([row_idx as i64, queries.start, queries.end, first_band, bands.len() as i64 / 4]);
            }
            end_query = end_query.max(row_end);
        }
        let runs = Tensor::from_slice(&runs).view([-1, 5]);
        let bands = Tensor::from_slice(&bands).view([-1, 4]);
        Ok(Self { runs, bands, rows: rows.len() as i64, end_query, end_key })
    }

    /// The same for some of the queries, which are counted from the first of them then.
    #[must_use]
    pub fn of_queries(&self, queries: &Range<i64>) -> Self {
        let (mut runs, mut bands) = (Vec::new(), Vec::new());
        let (mut end_query, mut end_key) = (0, 0);
        let (of_runs, of_bands) = (numbers(&self.runs), numbers(&self.bands));
        for run in of_runs.chunks(5) {
            let (first, end) = (run[1].max(queries.start), run[2].min(queries.end));
            if first >= end {
                continue;
            }
            let first_band = bands.len() as i64 / 4;
            for band in of_bands[4 * run[3] as usize..4 * run[4] as usize].chunks(4) {
                let keys_end = band[1].min(end + band[3]); // what the last of these queries sees
                if band[0] < keys_end {
                    bands.extend([band[0], keys_end, band[2] + queries.start, band[3] + queries.start]);
                    end_key = end_key.max(keys_end);
                }
            }
            runs.extend([run[0], first - queries.start, end - queries.start, first_band, bands.len() as i64 / 4]);
            end_query = end_query.max(end - queries.start);
        }
        let (runs, bands) = (Tensor::from_slice(&runs).view([-1, 5]), Tensor::from_slice(&bands).view([-1, 4]));
        Self { runs, bands, rows: self.rows, end_query, end_key }
    }

    /// Every one of `len` tokens of a row attends to all of them.
    pub fn all(rows: i64, len: i64) -> Self {
        let row = vec![Run { queries: 0..len, bands: vec![Band::all(0..len)] }];
        Self::new(&vec![row; rows.max(0) as usize]).expect("one run a row")
    }

    /// The same as an additive mask, `[batch, 1, queries, keys]`: 0 where a query attends to a key, minus infinity
    /// elsewhere. A query that attends to nothing has zeros, so that its softmax stays finite.
    pub fn mask(&self, queries: i64, keys: i64, device: Device, kind: Kind) -> Tensor {
        let seen = self.seen(queries, keys).to_device(device);
        let unseen = seen.logical_not().logical_and(&seen.any_dim(-1, true));
        Tensor::zeros([self.rows, 1, queries, keys], (kind, device))
            .masked_fill(&unseen.unsqueeze(1), f64::NEG_INFINITY)
    }

    /// Whether a query attends to a key, `[batch, queries, keys]`.
    fn seen(&self, queries: i64, keys: i64) -> Tensor {
        let mut seen = vec![false; (self.rows * queries * keys) as usize];
        let (runs, bands) = (numbers(&self.runs), numbers(&self.bands));
        for run in runs.chunks(5) {
            for band in bands[4 * run[3] as usize..4 * run[4] as usize].chunks(4) {
                for query in run[1]..run[2] {
                    let row = (run[0] * queries + query) * keys;
                    let (from, to) = (band[0].max(query + band[2]), band[1].min(query + band[3] + 1));
                    if from < to {
                        seen[(row + from) as usize..(row + to) as usize].fill(true);
                    }
                }
            }
        }
        Tensor::from_slice(&seen).view([self.rows, queries, keys])
    }
}

fn numbers(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.reshape([-1])).expect("int64")
}

/// `softmax(q k^T / sqrt(head_dim)) v` over the keys that `bands` gives each query, in memory that grows with the number of
/// tokens (Dao et al. 2022): for f32 and bf16 on the CPU, computed in f32.
///
/// `q` is `[batch, heads, queries, head_dim]`, `k` and `v` are `[batch, kv_heads, keys, head_dim]`, and so is the result as
/// `q`. Each key-value head serves `heads / kv_heads` neighbouring query heads.
///
/// # Panics
/// Where the shapes, or dtypes, are not these, or do not reach as far as `bands`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, bands: &Bands) -> Tensor {
    let (rows, queries, keys) = (bands.rows, bands.end_query, bands.end_key);
    let fits = q.dim() == 4 && k.dim() == 4 && q.size()[0] == rows && q.size()[2] >= queries && k.size()[2] >= keys;
    assert!(fits, "{rows} rows of {queries} queries and {keys} keys for q {:?} and k {:?}", q.size(), k.size());
    let arguments = [q, k, v, &bands.runs, &bands.bands].map(Tensor::as_ptr);
    // SAFETY: five live tensors; the runs and bands are within the others, as was just seen.
    let made = unsafe { ffi::vora_attention(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]) };
    ffi::tensor(made).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Whether [`attention`] serves tensors there, of that dtype.
pub fn has_attention(device: Device, kind: Kind) -> bool {
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Layouts without a plan behind them.
    struct Dice(fixtures::Random);

    impl Dice {
        fn below(&self, bound: i64) -> i64 {
            self.0.integers(0, bound, [1]).int64_value(&[0])
        }

        fn of<T: Copy>(&self, choices: &[T]) -> T {
            choices[self.below(choices.len() as i64) as usize]
        }

        fn band(&self, keys: Range<i64>) -> Band {
            let band = if self.below(2) == 0 { Band::causal(keys) } else { Band::all(keys) };
            if self.below(2) == 0 { band.from(-self.below(40)) } else { band }
        }

        /// Runs and bands of one row, with gaps between them.
        fn row(&self, queries: i64, keys: i64) -> Vec<Run> {
            let (mut runs, mut query) = (Vec::new(), self.below(3));
            while query < queries && runs.len() < 5 {
                let run = query..queries.min(query + 1 + self.below(70));
                query = run.end + self.below(3);
                let (mut bands, mut key) = (Vec::new(), self.below(9));
                while key < keys && bands.len() < 4 {
                    let band = key..keys.min(key + 1 + self.below(200));
                    key = band.end + self.below(9);
                    bands.push(self.band(band));
                }
                runs.push(Run { queries: run, bands });
            }
            runs
        }
    }

    /// The definition; a query that attends to nothing gets zeros.
    fn reference(q: &Tensor, k: &Tensor, v: &Tensor, bands: &Bands) -> Tensor {
        let repeated = |t: &Tensor| t.repeat_interleave_self_int(q.size()[1] / t.size()[1], 1, None);
        let unseen = bands.seen(q.size()[2], k.size()[2]).logical_not().unsqueeze(1);
        let scores = q.matmul(&repeated(k).transpose(2, 3)) / (q.size()[3] as f64).sqrt();
        scores.masked_fill(&unseen, -1e300).softmax(-1, q.kind()).masked_fill(&unseen, 0.0).matmul(&repeated(v))
    }

    #[test]
    fn some_of_the_queries_see_what_they_saw() {
        let dice = Dice(fixtures::Random::new(5));
        for _ in 0..40 {
            let (queries, keys) = (1 + dice.below(150), 1 + dice.below(150));
            let bands = Bands::new(&[dice.row(queries, keys)]).unwrap();
            let start = dice.below(queries);
            let part = start..start + 1 + dice.below(queries - start);
            let of_part = bands.of_queries(&part);
            let expected = bands.seen(queries, keys).narrow(1, part.start, part.end - part.start);
            assert!(of_part.seen(part.end - part.start, keys).equal(&expected), "{part:?} of {bands:?}");
            let beyond = expected.narrow(2, of_part.end_key, keys - of_part.end_key);
            assert!(beyond.any().int64_value(&[]) == 0, "{} of {keys} keys", of_part.end_key);
        }
    }

    /// The output and the gradients of q, k and v, of that kind, as f64.
    fn run(f: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor, qkv: &[Tensor; 3], kind: Kind) -> Vec<Tensor> {
        let leaves = qkv.each_ref().map(|t| t.to_kind(kind).detach().set_requires_grad(true));
        let [q, k, v] = &leaves;
        let y = f(q, k, v);
        assert_eq!(y.size(), q.size());
        let weights = Tensor::linspace(-1, 1, y.numel() as i64, (Kind::Double, Device::Cpu)).view(&*y.size());
        (&y * weights).sum(Kind::Double).backward();
        leaves.iter().map(Tensor::grad).chain([y]).map(|t| t.to_kind(Kind::Double)).collect()
    }

    fn check(size: (i64, i64), rows: &[Vec<Run>], groups: i64, kv_heads: i64, dim: i64, kind: Kind) {
        let bands = Bands::new(rows).unwrap();
        let random = fixtures::Random::new(5);
        let heads = [(size.0, groups * kv_heads), (size.1, kv_heads), (size.1, kv_heads)];
        // As a decoder hands them over: tokens first, seen as heads first; rounded as the kernel meets them.
        let qkv = heads.map(|(seq, heads)| {
            (random.normal([rows.len() as i64, seq, heads, dim]) * 2)
                .to_kind(kind)
                .to_kind(Kind::Double)
                .transpose(1, 2)
        });
        let found = run(|q, k, v| attention(q, k, v, &bands), &qkv, kind);
        let expected = run(|q, k, v| reference(q, k, v, &bands), &qkv, Kind::Double);
        let tolerance = if kind == Kind::Float { 2e-5 } else { 3e-2 };
        for (found, expected) in found.iter().zip(&expected) {
            let numbers = |t: &Tensor| Vec::<f64>::try_from(t.reshape([-1])).unwrap();
            let (found, expected) = (numbers(found), numbers(expected));
            let largest = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            let is_close = |(a, b): (&f64, &f64)| (a - b).abs() <= tolerance * largest; // false of what is not a number
            let all_close = found.iter().zip(&expected).all(is_close);
            assert!(all_close, "{groups} x {kv_heads} heads of {dim}, {kind:?}, {size:?}, {rows:?}");
        }
    }

    #[test]
    fn any_layout_is_its_definition() {
        for seed in 0..60 {
            let dice = Dice(fixtures::Random::new(seed));
            let (queries, keys) = (1 + dice.below(150), 1 + dice.below(300));
            let rows = [dice.row(queries, keys), dice.row(queries, keys)];
            let (groups, kv_heads) = (dice.of(&[1, 2, 3, 5, 1, 2, 3, 49]), dice.of(&[1, 2]));
            let (dim, kind) = (dice.of(&[1, 8, 24, 64, 80]), dice.of(&[Kind::Float, Kind::BFloat16]));
            check((queries, keys), &rows, groups, kv_heads, dim, kind);
        }
    }

    /// Generation's one query a row, over a part of a cache.
    #[test]
    fn one_query_is_its_definition() {
        for (seed, kind) in [(1, Kind::Float), (2, Kind::BFloat16), (3, Kind::Float), (4, Kind::BFloat16)] {
            let random = fixtures::Random::new(seed);
            let (groups, dim) = ([1, 3, 4, 7][seed as usize - 1], [16, 64, 80, 48][seed as usize - 1]);
            let states = |heads| (random.normal([3, heads, 90, dim]) * 2).to_kind(kind);
            let (q, k, v) = (states(2 * groups).narrow(2, 0, 1), states(2), states(2));
            let (k, v) = (k.narrow(2, 7, 70), v.narrow(2, 7, 70));
            let row = |bands| vec![Run { queries: 0..1, bands }];
            let rows = [vec![Band::all(0..70)], vec![Band::all(3..20), Band::all(40..41)], vec![Band::causal(0..9)]];
            let bands = Bands::new(&rows.map(row)).unwrap();
            let found = attention(&q, &k, &v, &bands).to_kind(Kind::Double);
            let [q, k, v] = [q, k, v].map(|t| t.to_kind(Kind::Double));
            let tolerance = if kind == Kind::Float { 1e-5 } else { 2e-2 };
            fixtures::assert_close_to(&found, &reference(&q, &k, &v, &bands), tolerance);
        }
        let x = Tensor::ones([2, 1, 1, 16], F32);
        let bands = Bands::new(&[vec![Run { queries: 0..1, bands: vec![] }], vec![]]).unwrap();
        assert_eq!(attention(&x, &x, &x, &bands).abs().sum(Kind::Float).double_value(&[]), 0.0);
    }

    #[test]
    fn a_long_row_is_cut_among_threads() {
        let text = |len| Run { queries: 0..len, bands: vec![Band::causal(0..len)] };
        check((700, 700), &[vec![text(700)]], 3, 1, 16, Kind::Float);
        let image = Run { queries: 3..603, bands: vec![Band::all(0..603)] };
        let rows = [vec![text(3), image, Run { queries: 610..650, bands: vec![Band::causal(0..650).from(-99)] }]];
        check((660, 650), &rows, 1, 1, 8, Kind::BFloat16);
    }

    #[test]
    fn what_is_hidden_may_be_anything() {
        let (q, k, v) =
            (Tensor::ones([1, 1, 2, 4], F32), Tensor::ones([1, 1, 3, 4], F32), Tensor::ones([1, 1, 3, 4], F32));
        let _ = k.select(2, 2).fill_(f64::NAN);
        let _ = v.select(2, 2).fill_(f64::INFINITY);
        let bands = Bands::new(&[vec![Run { queries: 0..2, bands: vec![Band::all(0..2)] }]]).unwrap();
        let leaves = [q, k, v].map(|t| t.set_requires_grad(true));
        let y = attention(&leaves[0], &leaves[1], &leaves[2], &bands);
        y.sum(Kind::Float).backward();
        fixtures::assert_close_to(&y, &Tensor::ones([1, 1, 2, 4], F32), 1e-6);
        assert!(leaves.iter().all(|t| bool::try_from(t.grad().isfinite().all()).unwrap()));
    }

    #[test]
    fn nothing_in_gives_nothing() {
        for (size, rows) in [((0, 3), vec![vec![]]), ((2, 0), vec![vec![Run { queries: 0..2, bands: vec![] }]])] {
            check(size, &rows, 2, 1, 8, Kind::Float);
        }
    }

    #[test]
    fn overlaps_are_told() {
        let run = |queries, bands| Run { queries, bands };
        for (row, says) in [
            (vec![run(0..3, vec![]), run(2..4, vec![])], "queries 2..4 of row 0"),
            (vec![run(0..3, vec![Band::all(2..5), Band::all(0..3)])], "keys 2..5 of queries 0..3 of row 0"),
        ] {
            assert_eq!(Bands::new(&[row]).unwrap_err().to_string(), says);
        }
    }

    #[test]
    #[should_panic(expected = "1 rows of 4 queries and 4 keys for q [1, 1, 3, 8]")]
    fn what_does_not_reach_as_far_panics() {
        let bands = Bands::new(&[vec![Run { queries: 0..4, bands: vec![Band::all(0..4)] }]]).unwrap();
        let x = Tensor::zeros([1, 1, 3, 8], F32);
        let _ = attention(&x, &x, &x, &bands);
    }
}
