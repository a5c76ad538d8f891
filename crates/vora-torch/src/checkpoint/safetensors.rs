//! The header of a safetensors file, every range in it checked against the file; and the dtypes that it has.

use std::collections::HashSet;

use anyhow::{Context, Result, anyhow, bail};
use safetensors::{Dtype, SafeTensors};
use serde::Deserializer;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use tch::Kind;

use crate::checkpoint::entry::{Entry, dims};

/// What a safetensors file says of its tensors, each range checked against the file.
pub(super) fn entries(map: &[u8]) -> Result<Vec<(String, Entry)>> {
    let (header_len, metadata) = SafeTensors::read_metadata(map).map_err(|e| anyhow!("{e}"))?;
    let data_start = header_len + size_of::<u64>();
    // The reader lets the later one of two equal names win; who wrote them meant one of them to be overlooked.
    let unique = serde_json::Deserializer::from_slice(&map[size_of::<u64>()..data_start]).deserialize_map(UniqueNames);
    unique.map_err(|e| anyhow!("{e}"))?;
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let in_tensor = || format!("tensor `{name}`");
            let kind = kind_of(info.dtype).with_context(in_tensor)?;
            let shape = dims(&info.shape).with_context(in_tensor)?;
            let (start, end) = info.data_offsets;
            Ok((name, Entry { file_idx: 0, range: Some(data_start + start..data_start + end), kind, shape }))
        })
        .collect()
}

/// Reads a JSON object for its keys alone: two equal ones are an error.
struct UniqueNames;

impl<'de> Visitor<'de> for UniqueNames {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if seen.contains(&name) {
                return Err(A::Error::custom(format_args!("two tensors are named `{name}`")));
            }
            seen.insert(name);
        }
        Ok(())
    }
}

/// libtorch's name for a safetensors dtype.
fn kind_of(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        other => bail!("dtype {other:?} is not supported"),
    })
}

/// The safetensors name for a dtype of libtorch's.
pub(super) fn dtype_of(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        other => bail!("safetensors has no dtype for {other:?}"),
    })
}
