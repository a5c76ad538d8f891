//! Keys and values of many sequences in pages of one pool, for an engine that takes requests as they come.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_torch::nn::decode::{LoraId, Pages};
use vora_torch::runtime::reserved_zeros;

use crate::config::LlmConfig;
use crate::kv_cache::Step;

/// Keys and values of every layer that makes its own, in memory taken once: pages of a few tokens, of which each sequence has a list of its own.
/// Who has which page is its caller's business.
#[derive(Debug)]
pub struct KvPages {
    pub(crate) layers: Vec<LayerPages>,
    pages: i64,
    page_len: i64,
    kind: Kind,
    device: Device,
}

/// One layer's part.
#[derive(Debug)]
pub(crate) struct LayerPages {
    pub(crate) keys: Tensor,   // [pages, kv_heads, page_len, head_dim], rotated
    pub(crate) values: Tensor, // [pages, kv_heads, page_len, head_dim]
}

/// A sequence as a decoding step or a prefill takes it.
#[derive(Debug, Clone, Copy)]
pub struct PagedRow<'a> {
    /// Its pages: token `t` lies in page `pages[t / page_len]`, at `t % page_len`.
    pub pages: &'a [i32],
    /// Tokens that are held already.
    pub len: i64,
    /// The adapter that acts on what a decoding step adds.
    pub adapter: LoraId,
}

/// Where the tokens of some rows lie.
#[derive(Debug)]
pub(crate) struct Places {
    /// Pages of each row, `[rows, pages]`; rows with fewer repeat some page.
    tables: Tensor,
    /// Page and slot of every new token, `[rows * new]` each.
    new: [Tensor; 2],
}

impl KvPages {
    /// Room for `pages` pages of `page_len` tokens; `kind` is the model's dtype.
    ///
    /// # Errors
    /// Where there is no room to take, or more than 2^31 pages.
    pub fn new(config: &LlmConfig, pages: i64, page_len: i64, device: Device, kind: Kind) -> Result<Self> {
        ensure!(pages > 0 && i32::try_from(pages).is_ok(), "a cache of {pages} pages");
        ensure!(page_len > 0, "pages of {page_len} tokens");
        // Zeros, since a masked value still meets its weight of zero in a product, and 0 * NaN is NaN.
        // Those that no token comes to take no memory.
        let zeros = |(heads, head_dim)| match device {
            Device::Cpu => reserved_zeros(&[pages, heads, page_len, head_dim], kind),
            _ => Ok(Tensor::f_zeros([pages, heads, page_len, head_dim], (kind, device))?),
        };
        let layer = |size| Ok(LayerPages { keys: zeros(size)?, values: zeros(size)? });
        let layers = config.cached_heads().map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, pages, page_len, kind, device })
    }

    /// Bytes that one page takes in a cache of this dtype, all layers together.
    pub fn page_bytes(config: &LlmConfig, page_len: i64, kind: Kind) -> usize {
        let a_token: i64 = config.cached_heads().map(|(heads, head_dim)| 2 * heads * head_dim).sum();
        (a_token * page_len) as usize * kind.elt_size_in_bytes()
    }

    /// The same memory as a [`PackedDecoder`](crate::PackedDecoder) takes it.
    ///
    /// # Errors
    /// As [`Pages::new`].
    pub fn packed(&self) -> Result<Pages> {
        let (keys, values): (Vec<Tensor>, Vec<Tensor>) =
            self.layers.iter().map(|layer| (layer.keys.shallow_clone(), layer.values.shallow_clone())).unzip();
        Pages::new(&keys, &values)
    }

    /// Pages in all.
    pub fn pages(&self) -> i64 {
        self.pages
    }

    /// Tokens of a page.
    pub fn page_len(&self) -> i64 {
        self.page_len
    }

    /// Keys and values of a layer, `[pages, kv_heads, page_len, head_dim]` each, keys rotated.
    pub fn layer(&self, layer_idx: usize) -> (&Tensor, &Tensor) {
        (&self.layers[layer_idx].keys, &self.layers[layer_idx].values)
    }

    /// Checks that every row has pages for its tokens and `new` ones more, and that they are pages of this cache.
    ///
    /// # Errors
    /// Says which row lacks what.
    pub(crate) fn check(&self, rows: &[PagedRow<'_>], new: i64) -> Result<()> {
        ensure!(!rows.is_empty(), "a step of no rows");
        for (i, row) in rows.iter().enumerate() {
            let room = row.pages.len() as i64 * self.page_len;
            let needed = row.len + new;
            ensure!(row.len >= 0 && needed <= room, "row {i} has pages for {room} tokens and is to hold {needed}");
            let known = 0..self.pages as i32;
            let unknown = row.pages.iter().find(|page| !known.contains(page));
            ensure!(unknown.is_none(), "row {i} has page {unknown:?} of a cache of {} pages", self.pages);
        }
        Ok(())
    }

    /// Where `new` more tokens of each of these rows go, and where the tokens lie that they attend to.
    pub(crate) fn places(&self, rows: &[PagedRow<'_>], new: i64) -> Places {
        let used = |row: &PagedRow<'_>| ((row.len + new + self.page_len - 1) / self.page_len) as usize;
        let most = rows.iter().map(used).max().unwrap_or(0);
        let mut tables = Vec::with_capacity(rows.len() * most);
        let (mut pages, mut slots) = (Vec::new(), Vec::new());
        for row in rows {
            let held = &row.pages[..used(row)];
            tables.extend(held.iter().map(|&page| i64::from(page)));
            tables.extend((held.len()..most).map(|_| i64::from(held[0])));
            for place in row.len..row.len + new {
                pages.push(i64::from(row.pages[(place / self.page_len) as usize]));
                slots.push(place % self.page_len);
            }
        }
        let tensor = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(self.device);
        Places { tables: tensor(&tables).view([-1, most as i64]), new: [tensor(&pages), tensor(&slots)] }
    }

    /// Plans a step that adds one token to every row.
    pub(crate) fn next_step(&self, rows: &[PagedRow<'_>]) -> Step {
        let (lens, adapters): (Vec<i64>, Vec<LoraId>) = rows.iter().map(|row| (row.len, row.adapter)).unzip();
        Step::new(&lens, &adapters, self.device, self.kind)
    }
}

impl LayerPages {
    /// Keeps `[rows, kv_heads, new, head_dim]` in their places.
    pub(crate) fn keep(&mut self, k: &Tensor, v: &Tensor, places: &Places) {
        let [pages, slots] = &places.new;
        for (kept, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            let (_, kv_heads, _, head_dim) = new.size4().expect("keys are [rows, kv_heads, new, head_dim]");
            let new = new.transpose(1, 2).reshape([-1, kv_heads, head_dim]);
            let _ = kept.index_put_(&[Some(pages), None, Some(slots)], &new, false);
        }
    }

    /// The keys and values of `seen` in every row, `[rows, kv_heads, seen, head_dim]`.
    pub(crate) fn seen(&self, places: &Places, seen: Range<i64>) -> [Tensor; 2] {
        let (rows, pages) = places.tables.size2().expect("tables are [rows, pages]");
        let (_, kv_heads, page_len, head_dim) =
            self.keys.size4().expect("keys are [pages, kv_heads, page_len, head_dim]");
        let gather = |kept: &Tensor| {
            let of_rows =
                kept.index_select(0, &places.tables.view([-1])).view([rows, pages, kv_heads, page_len, head_dim]);
            let of_rows = of_rows.transpose(1, 2).reshape([rows, kv_heads, pages * page_len, head_dim]);
            of_rows.narrow(2, seen.start, seen.end - seen.start)
        };
        [gather(&self.keys), gather(&self.values)]
    }
}
