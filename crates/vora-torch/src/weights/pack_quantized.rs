//! Weights in groups as `compressed-tensors` stores them (its format `pack-quantized`, which transformers and vLLM read): in
//! the place of `weight` there are `weight_packed`, i32 words that hold the numbers from the lowest bits on, each plus half of
//! its range, `weight_scale` `[out, groups]`, and `weight_shape`.

use anyhow::{Context, Result, bail, ensure};
use tch::{Kind, Tensor};

use crate::packed::{PackedLinear, Width};

/// Numbers that share a scale here.
const GROUP: i64 = 32;
/// What is added to a number of eight bits, and taken from it again: its highest bit turns.
const TURN: i64 = 0x80;

/// The tensors that a weight of this name is stored as.
const PACKED: &str = "_packed";
const SCALE: &str = "_scale";
const SHAPE: &str = "_shape";
/// Those that weights with an offset, or with columns in another order, have besides.
const NOT_READ: [(&str, &str); 2] = [
    ("_zero_point", "an offset for every group; those are read that are `symmetric: true`"),
    ("_g_idx", "columns in another order; those are read that are `actorder: null`"),
];

/// The tensors that a weight is stored as, by the ends of their names.
pub(super) const PARTS: [&str; 3] = [PACKED, SCALE, SHAPE];

/// The weight `name` `[out, in]` of which `stored` finds the tensors, by the ends of their names; none where there are none.
///
/// Scales that are shared by several groups of 32, or by a row, are repeated, and brought into f16.
///
/// # Errors
/// Another number of bits than 4 or 8, an offset, groups that are no multiple of 32, another size; each by the tensor's name.
pub(super) fn read(
    name: &str,
    stored: &dyn Fn(&str) -> Result<Option<Tensor>>,
    [rows, columns]: [i64; 2],
) -> Result<Option<PackedLinear>> {
    let Some(packed) = stored(PACKED)? else { return Ok(None) };
    for (part, has) in NOT_READ {
        ensure!(stored(part)?.is_none(), "{name}{part}: this weight has {has}");
    }
    let scale = stored(SCALE)?.with_context(|| format!("{name}{PACKED} has no {name}{SCALE}"))?;
    let made = unpack(&packed, &scale, [rows, columns])
        .and_then(|(values, scales)| PackedLinear::from_parts(&values, &scales, columns));
    made.map(Some).with_context(|| format!("reading {name}{PACKED}"))
}

/// `[out, words]` and `[out, groups]` -> values and scales as [`PackedLinear::from_parts`] takes them
fn unpack(packed: &Tensor, scale: &Tensor, [rows, columns]: [i64; 2]) -> Result<(Tensor, Tensor)> {
    let words = |bits: i64| (columns * bits + 31) / 32;
    ensure!(words(4) < words(8), "a row of {columns} numbers does not tell 4 bits from 8");
    let width = match packed.size()[..] {
        [r, n] if r == rows && n == words(8) => Width::Int8,
        [r, n] if r == rows && n == words(4) => Width::Int4,
        ref other => bail!(
            "it is {other:?}: a weight [{rows}, {columns}] takes [{rows}, {}] in 4 bits, or [{rows}, {}] in 8",
            words(4),
            words(8)
        ),
    };
    ensure!(packed.kind() == Kind::Int, "it is {:?}, i32 was expected", packed.kind());
    let groups = (columns + GROUP - 1) / GROUP;
    let scales = match scale.size()[..] {
        [r, n] if r == rows && n == groups => scale.shallow_clone(),
        [r, n] if r == rows && n > 0 && columns % n == 0 && (n == 1 || columns / n % GROUP == 0) => {
            scale.f_repeat_interleave_self_int(groups / n, 1, None)?
        }
        ref other => bail!(
            "its scales are {other:?}: groups of a multiple of {GROUP} of {columns} numbers were expected, such as [{rows}, {groups}]"
        ),
    };
    let scales = scales.to_kind(Kind::Half);
    ensure!(bool::try_from(scales.isfinite().all())?, "its scales have numbers that f16 does not hold");
    let bytes = packed.contiguous().f_view_dtype(Kind::Uint8)?; // [out, words * 4]
    // Behind the last number of a row, zeros.
    let filled = |len: i64, zero: i64| {
        let missing = [rows, (len - bytes.size()[1]).max(0)];
        let zeros = Tensor::full(missing, zero, (Kind::Uint8, bytes.device()));
        Tensor::f_cat(&[bytes.narrow(1, 0, bytes.size()[1].min(len)), zeros], 1)
    };
    let values = match width {
        Width::Int8 => {
            let bytes = filled(groups * GROUP, TURN)?;
            bytes.bitwise_xor(TURN).contiguous().f_view_dtype(Kind::Int8)?.view([rows, groups, GROUP])
        }
        _ => {
            let bytes = filled(groups * GROUP / 2, TURN | TURN >> 4)?;
            let numbers = Tensor::stack(&[bytes.bitwise_and(15), bytes.bitwise_right_shift_tensor_scalar(4)], 2);
            let halves = numbers.view([rows, groups, 2, GROUP / 2]); // of a group: the first 16 numbers, the last 16
            halves.select(2, 0).bitwise_or_tensor(&(halves.select(2, 1) * 16))
        }
    };
    Ok((values, scales))
}

/// What a weight in groups is stored as, by the ends of the names: words, scales, shape.
///
/// # Errors
/// Where memory is short.
pub(super) fn write(weight: &PackedLinear) -> Result<[(&'static str, Tensor); 3]> {
    let (rows, columns) = (weight.out_features(), weight.in_features());
    let [values, scales] = weight.parts()?;
    let (bytes, bits) = match values.kind() {
        Kind::Int8 => (values.view([rows, -1]).f_view_dtype(Kind::Uint8)?.bitwise_xor(TURN), 8),
        _ => {
            let halves = [values.bitwise_and(15), values.bitwise_right_shift_tensor_scalar(4)]; // [out, groups, 16]
            let numbers = Tensor::f_cat(&halves, 2)?.view([rows, -1, 2]);
            (numbers.select(2, 0).bitwise_or_tensor(&(numbers.select(2, 1) * 16)), 4)
        }
    };
    let words = (columns * bits + 31) / 32;
    let packed = bytes.narrow(1, 0, words * 4).contiguous().f_view_dtype(Kind::Int)?;
    Ok([(PACKED, packed), (SCALE, scales), (SHAPE, Tensor::from_slice(&[rows, columns]))])
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::weights::{Quantization, QuantizedWeight, Weights};

    fn source(tensors: &[(&str, &Tensor)]) -> Weights {
        let tensors = tensors.iter().map(|(name, t)| ((*name).to_owned(), t.shallow_clone()));
        Weights::from_tensors(tensors, Device::Cpu, Kind::BFloat16)
    }

    /// Words and scales that the package `compressed-tensors` made, and the weight that it makes of them again.
    #[test]
    fn the_packages_own_words_are_read() {
        let golden = fixtures::open("pack_quantized");
        for case in ["int4", "int8", "int4_of_128", "int8_of_a_row", "int4_part", "int8_part"] {
            let get = |part: &str| &golden[&format!("{case}.{part}")];
            let (packed, scale) = (get("weight_packed"), get("weight_scale"));
            let shape = Vec::<i64>::try_from(get("weight_shape")).unwrap();
            let weights =
                source(&[("weight_packed", packed), ("weight_scale", scale), ("weight_shape", get("weight_shape"))]);
            let read = weights.packed("weight", [shape[0], shape[1]]).unwrap().unwrap();
            weights.finish().unwrap();
            assert!(read.dequantise(0..shape[0], Kind::Float).unwrap().equal(get("weight")), "{case}");
            // Written again they are the same words, but for what fills the last of them.
            let [(_, words), (_, scales), (_, again)] = write(&read).unwrap();
            if shape[1] % 32 == 0 {
                assert!(words.equal(packed), "{case}");
            }
            assert!(
                Vec::<i64>::try_from(again).unwrap() == shape && scales.size()[1] == (shape[1] + 31) / 32,
                "{case}"
            );
        }
    }

    #[test]
    fn what_is_written_is_read_bit_for_bit() {
        let random = fixtures::Random::new(3);
        for (columns, quantization) in [64, 33, 40, 7, 96]
            .into_iter()
            .flat_map(|columns| [Quantization::Int8Groups, Quantization::Int4Groups].map(|q| (columns, q)))
        {
            let kept = QuantizedWeight::new(&random.normal([5, columns]), quantization).unwrap();
            let [(p, words), (s, scales), (z, shape)] = write(kept.packed().unwrap()).unwrap();
            let names = [p, s, z].map(|part| format!("weight{part}"));
            let weights = source(&[(&names[0], &words), (&names[1], &scales), (&names[2], &shape)]);
            let again = weights.packed("weight", [5, columns]).unwrap().unwrap();
            assert!(again.dequantise(0..5, Kind::Float).unwrap().equal(&kept.dequantized(Kind::Float)), "{columns}");
            let (found, expected) = (again.parts().unwrap(), kept.packed().unwrap().parts().unwrap());
            assert!(found.iter().zip(&expected).all(|(a, b)| a.equal(b)), "{columns} {quantization:?}");
        }
    }

    #[test]
    fn what_is_not_read_is_told_by_name() {
        let kept = QuantizedWeight::new(&fixtures::Random::new(3).normal([4, 64]), Quantization::Int4Groups).unwrap();
        let [(_, words), (_, scales), _] = write(kept.packed().unwrap()).unwrap();
        let told = |tensors: &[(&str, &Tensor)], size| {
            let error = source(tensors).pp("q_proj").packed("weight", size).unwrap_err();
            format!("{error:#}")
        };
        let (packed, scale) = (("q_proj.weight_packed", &words), ("q_proj.weight_scale", &scales));
        assert!(source(&[scale]).packed("weight", [4, 64]).unwrap().is_none());
        let said = told(&[packed], [4, 64]);
        assert!(said.contains("q_proj.weight_packed has no q_proj.weight_scale"), "{said}");
        let said = told(&[packed, scale, ("q_proj.weight_zero_point", &words)], [4, 64]);
        assert!(said.contains("q_proj.weight_zero_point: this weight has an offset"), "{said}");
        let said = told(&[packed, scale, ("q_proj.weight_g_idx", &words)], [4, 64]);
        assert!(said.contains("q_proj.weight_g_idx: this weight has columns in another order"), "{said}");
        let said = told(&[packed, scale], [4, 96]);
        assert!(said.contains("it is [4, 8]: a weight [4, 96] takes [4, 12] in 4 bits, or [4, 24] in 8"), "{said}");
        let said = told(&[packed, ("q_proj.weight_scale", &Tensor::ones([4, 4], (Kind::Half, Device::Cpu)))], [4, 64]);
        assert!(said.contains("its scales are [4, 4]: groups of a multiple of 32 of 64 numbers"), "{said}");
        let said =
            told(&[packed, ("q_proj.weight_scale", &Tensor::full([4, 2], 1e9, (Kind::Float, Device::Cpu)))], [4, 64]);
        assert!(said.contains("its scales have numbers that f16 does not hold"), "{said}");
        let said = told(&[("q_proj.weight_packed", &words.to_kind(Kind::Int64)), scale], [4, 64]);
        assert!(said.contains("it is Int64, i32 was expected"), "{said}");
    }
}
