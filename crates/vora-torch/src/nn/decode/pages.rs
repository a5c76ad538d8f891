//! `Pages`: keys and values of all layers, in pieces of a fixed length.

use std::ffi::c_void;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

/// Keys and values of every layer, `[pages, kv_heads, page_len, head_dim]` each, f32 or bf16, keys rotated. Token `t` of a row
/// lies in page `table[t / page_len]` of the row's table, at slot `t % page_len`. It shares the tensors that it is made of.
#[derive(Debug)]
pub struct Pages {
    tensors: Vec<[Tensor; 2]>,
    keys: Addresses,
    values: Addresses,
    size: [i64; 4],
    kind: Kind,
}

/// Where tensors begin.
#[derive(Debug)]
struct Addresses(Vec<*mut c_void>);

// SAFETY: an address is no access; the tensors that lie there are `Send`.
unsafe impl Send for Addresses {}

impl Pages {
    /// One tensor of keys and one of values for each layer.
    ///
    /// # Errors
    /// Tensors of several sizes or dtypes, not contiguous, or not on the CPU.
    pub fn new(keys: &[Tensor], values: &[Tensor]) -> Result<Self> {
        ensure!(
            keys.len() == values.len() && !keys.is_empty(),
            "keys of {} layers, values of {}",
            keys.len(),
            values.len()
        );
        let kind = keys[0].kind();
        let size = keys[0].size();
        let size: [i64; 4] = size
            .as_slice()
            .try_into()
            .map_err(|_| anyhow::anyhow!("pages are {size:?}, [pages, kv_heads, page_len, head_dim] was expected"))?;
        ensure!(size.iter().all(|&n| n > 0), "pages are {size:?}");
        ensure!(matches!(kind, Kind::Float | Kind::BFloat16), "pages are {kind:?}, f32 or bf16 was expected");
        for t in keys.iter().chain(values) {
            ensure!(
                t.size() == size && t.kind() == kind && t.device() == Device::Cpu && t.is_contiguous(),
                "pages {:?} in {:?} beside {size:?} in {kind:?}: all are alike, contiguous and on the CPU",
                t.size(),
                t.kind()
            );
        }
        let tensors = keys.iter().zip(values).map(|(k, v)| [k.shallow_clone(), v.shallow_clone()]).collect();
        let addresses = |tensors: &[Tensor]| Addresses(tensors.iter().map(Tensor::data_ptr).collect());
        Ok(Self { tensors, keys: addresses(keys), values: addresses(values), size, kind })
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.tensors.len()
    }

    /// Pages of each layer.
    pub fn num_pages(&self) -> i64 {
        self.size[0]
    }

    /// Tokens in a page.
    pub fn page_len(&self) -> i64 {
        self.size[2]
    }

    /// The dtype of keys and values.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `[kv_heads, head_dim]`
    pub(super) fn head(&self) -> [i64; 2] {
        [self.size[1], self.size[3]]
    }

    /// Where keys and values of each layer begin.
    pub(super) fn addresses(&self) -> [*const *mut c_void; 2] {
        [self.keys.0.as_ptr(), self.values.0.as_ptr()]
    }
}
