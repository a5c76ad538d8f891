//! Packed matrices against plain formulas, and the promise that a row's result is its own.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::*;

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn numbers(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

/// One group's values and scale by ggml's formulas.
fn quantised(group: &[f32], width: Width) -> (Vec<i32>, f32) {
    let largest = group.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    let d = if width == Width::Int8 { largest.abs() / 127.0 } else { largest / -8.0 };
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let value = |x: f32| match width {
        Width::Int8 => (x * inverse).round() as i32,
        _ => ((x * inverse + 8.5) as i32).min(15) - 8,
    };
    (group.iter().map(|&x| value(x)).collect(), half(d))
}

fn half(x: f32) -> f32 {
    numbers(&Tensor::from_slice(&[x]).to_kind(Kind::Half))[0]
}

/// What a weight becomes by the plain formula, `[out, in]`
fn dequantised(weight: &Tensor, width: Width) -> Tensor {
    let in_features = weight.size()[1] as usize;
    let mut made = Vec::new();
    for row in numbers(weight).chunks(in_features) {
        for group in row.chunks(32) {
            let (values, scale) = quantised(group, width);
            made.extend(values.iter().map(|&value| value as f32 * scale));
        }
    }
    Tensor::from_slice(&made).view(&weight.size()[..])
}

/// What `x` becomes before a product of this width.
fn rounded(x: &Tensor, width: Width) -> Tensor {
    match width {
        Width::F32 => x.shallow_clone(),
        Width::Bf16 => x.to_kind(Kind::BFloat16).to_kind(Kind::Float),
        Width::Int8 | Width::Int4 => {
            let mut made = Vec::new();
            for row in numbers(x).chunks(x.size()[1] as usize) {
                for group in row.chunks(32) {
                    let top = group.iter().fold(0f32, |a, b| a.max(b.abs()));
                    let inverse = if top == 0.0 { 0.0 } else { 127.0 / top };
                    let value = |x: f32| (f64::from(x) * f64::from(inverse)).round_ties_even() as f32;
                    made.extend(group.iter().map(|&x| value(x) * (top / 127.0)));
                }
            }
            Tensor::from_slice(&made).view(&x.size()[..])
        }
    }
}

#[test]
fn quantising_is_what_it_says() {
    let random = fixtures::Random::new(1);
    for width in [Width::Int8, Width::Int4] {
        for (out_features, in_features) in [(16, 32), (5, 33), (37, 96), (1, 7), (64, 128)] {
            let weight = random.normal([out_features, in_features]) * 3;
            let _ = weight.get(0).fill_(0.0); // a group without a scale
            let packed = PackedLinear::new(&weight, width).unwrap();
            let expected = dequantised(&weight, width);
            assert!(packed.dequantise(0..out_features, Kind::Float).unwrap().equal(&expected), "{width}");
            let last = packed.dequantise(out_features - 1..out_features, Kind::BFloat16).unwrap();
            assert!(last.equal(&expected.narrow(0, out_features - 1, 1).to_kind(Kind::BFloat16)));
            let rows = packed.rows(&[out_features - 1, 0], Kind::Float).unwrap();
            assert!(rows.equal(&expected.index_select(0, &Tensor::from_slice(&[out_features - 1, 0]))));
            // Its parts, as they are saved, make it again.
            let [values, scales] = packed.parts().unwrap();
            let again = PackedLinear::from_parts(&values, &scales, in_features).unwrap();
            assert!(again.width() == width && again.dequantise(0..out_features, Kind::Float).unwrap().equal(&expected));
            let (first, scale) =
                quantised(&numbers(&weight.get(out_features - 1))[..in_features.min(32) as usize], width);
            assert_eq!(numbers(&scales.get(out_features - 1))[0], scale);
            let value = numbers(&values.get(out_features - 1).get(0))[0] as i32;
            assert_eq!(if width == Width::Int8 { value } else { (value & 15) - 8 }, first[0]);
            // From bf16 the same.
            let bf16 = weight.to_kind(Kind::BFloat16);
            let packed = PackedLinear::new(&bf16, width).unwrap().dequantise(0..out_features, Kind::Float).unwrap();
            assert!(packed.equal(&dequantised(&bf16, width)));
        }
    }
}

#[test]
fn blocks_are_ggmls() {
    let golden = fixtures::open("gguf_quants");
    let values = golden["values"].to_kind(Kind::Float).reshape([-1, 32]);
    for (width, name, bytes) in [(Width::Int8, "Q8_0", 34), (Width::Int4, "Q4_0", 18)] {
        let packed = PackedLinear::new(&values, width).unwrap();
        let [found, scales] = packed.parts().unwrap();
        let blocks = golden[name].reshape([-1, bytes]); // a scale of two bytes, then values
        let expected: Vec<u8> = Vec::try_from(blocks.narrow(1, 2, bytes - 2).contiguous().view([-1])).unwrap();
        let found: Vec<u8> = match width {
            Width::Int8 => Vec::<i8>::try_from(found.view([-1])).unwrap().into_iter().map(i8::cast_unsigned).collect(),
            _ => Vec::try_from(found.view([-1])).unwrap(),
        };
        assert!(found == expected, "{name}");
        let expected = blocks.narrow(1, 0, 2).contiguous().view_dtype(Kind::Half);
        assert!(scales.equal(&expected), "{name}");
    }
    for bad in [f64::NAN, 1e9] {
        let error = PackedLinear::new(&Tensor::full([1, 32], bad, F32), Width::Int4).unwrap_err().to_string();
        assert!(error.starts_with("a weight has numbers that are not finite"), "{error}");
    }
}

#[test]
fn products_are_those_of_rounded_numbers() {
    let random = fixtures::Random::new(2);
    for width in Width::ALL {
        for (out_features, in_features) in [(16, 32), (5, 33), (130, 96), (1, 7), (64, 576)] {
            let (weight, bias) = (random.normal([out_features, in_features]), random.normal([out_features]));
            let packed = PackedLinear::new(&weight, width).unwrap().with_bias(&bias, false).unwrap();
            let plain = packed.dequantise(0..out_features, Kind::Float).unwrap();
            for rows in [1, 2, 3, 5, 8, 19] {
                let x = random.normal([rows, in_features]) * 2;
                let expected = rounded(&x, width).linear(&plain, Some(&bias));
                let tolerance = 2e-6 * in_features as f64;
                fixtures::assert_close_to(&packed.forward(&x).unwrap(), &expected, tolerance);
            }
            let x = random.normal([2, 3, in_features]).to_kind(Kind::BFloat16);
            let y = packed.forward(&x).unwrap();
            assert_eq!((y.kind(), y.size()), (Kind::BFloat16, vec![2, 3, out_features]));
        }
    }
}

#[test]
fn a_weight_of_that_dtype_is_shared() {
    let weight = fixtures::Random::new(3).normal([4, 6]);
    let shared = PackedLinear::new(&weight, Width::F32).unwrap();
    assert_eq!((shared.num_bytes(), shared.num_copied_bytes()), (96, 0));
    let copied = PackedLinear::new(&weight, Width::Bf16).unwrap();
    assert_eq!((copied.num_bytes(), copied.num_copied_bytes()), (48, 48));
}

#[test]
fn adapters_act_on_their_rows_alone() {
    let random = fixtures::Random::new(4);
    for width in Width::ALL {
        let (weight, x) = (random.normal([20, 40]), random.normal([3, 40]));
        let (a, b) = (random.normal([5, 40]), random.normal([20, 5]));
        let bias = random.normal([20]);
        let plain = PackedLinear::new(&weight, width).unwrap();
        let packed = PackedLinear::new(&weight, width).unwrap().with_bias(&bias, true).unwrap();
        let packed =
            packed.with_adapter(LoraId::OWN, &a, &b, 0.5).unwrap().with_adapter(LoraId::OWN, &a, &b, 0.25).unwrap();
        let y = packed.forward_on(&x, &[LoraId::OWN, LoraId::NONE, LoraId::OWN]).unwrap();
        let without = plain.forward(&x).unwrap();
        assert!(y.get(1).equal(&without.get(1)));
        let added = x.matmul(&a.tr()).matmul(&b.tr()) * 0.75 + bias;
        let tolerance = if width == Width::F32 { 1e-4 } else { 0.5 };
        fixtures::assert_close_to(&y.get(2), &(&without + added).get(2), tolerance);

        // Others by name, of other ranks; the bias is the own one's.
        let named = |index| LoraId::named(index).unwrap();
        let (c, d) = (random.normal([9, 40]), random.normal([20, 9]));
        let packed = packed.with_adapter(named(1), &c, &d, 2.0).unwrap();
        let y = packed.forward_on(&x, &[named(1), named(0), LoraId::OWN]).unwrap();
        let added = x.matmul(&c.tr()).matmul(&d.tr()) * 2.0;
        fixtures::assert_close_to(&y.get(0), &(&without + added).get(0), if width == Width::F32 { 1e-3 } else { 5.0 });
        assert!(y.get(1).equal(&without.get(1)));
        assert!(y.get(2).equal(&packed.forward_on(&x, &[LoraId::OWN; 3]).unwrap().get(2)));
        let error = packed.forward_on(&x, &[LoraId::OWN]).unwrap_err().to_string();
        assert_eq!(error, "3 rows, adapters of 1");
    }
}

/// A decoder of two layers with adapters, biases, norms of heads and a window, of sizes that fill no vector.
fn decoder(width: Width, norms_after: bool) -> Decoder {
    let random = fixtures::Random::new(5);
    let shape = DecoderShape {
        hidden_size: 72,
        intermediate_size: 104,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 20,
        rms_norm_eps: 1e-5,
        head_norm_eps: 1e-5,
        scale: 20f64.powf(-0.5),
        norms_after,
    };
    let linear = |out_features: i64, in_features: i64| {
        let weight = random.normal([out_features, in_features]) * (in_features as f64).powf(-0.5);
        let bias = random.normal([out_features]) * 0.1;
        let (a, b) = (random.normal([3, in_features]) * 0.1, random.normal([out_features, 3]) * 0.1);
        let mut packed = PackedLinear::new(&weight, width).unwrap().with_bias(&bias, false).unwrap();
        packed = packed.with_adapter(LoraId::OWN, &a, &b, 2.0).unwrap();
        // One by name whose rank fills more than a unit, on some of the linears.
        if out_features != 40 {
            let (a, b) = (random.normal([70, in_features]) * 0.1, random.normal([out_features, 70]) * 0.1);
            packed = packed.with_adapter(LoraId::named(1).unwrap(), &a, &b, 0.5).unwrap();
        }
        packed
    };
    let layer = |first: bool| {
        let head_norm = |heads: i64| {
            Some(if first {
                HeadNorm::Rms(random.normal([20]))
            } else {
                HeadNorm::Layer { weight: random.normal([heads, 20]), bias: random.normal([heads, 20]) }
            })
        };
        Layer {
            q_proj: linear(120, 72),
            k_proj: linear(40, 72),
            v_proj: linear(40, 72),
            o_proj: linear(72, 120),
            gate_proj: linear(104, 72),
            up_proj: linear(104, 72),
            down_proj: linear(72, 104),
            input_layernorm: random.normal([72]),
            post_attention_layernorm: random.normal([72]),
            q_norm: head_norm(6),
            k_norm: head_norm(2),
            rotates: first,
            window: (!first).then_some(7),
        }
    };
    let head = PackedLinear::new(&(random.normal([90, 72]) * 0.2), width).unwrap();
    Decoder::new(shape, vec![layer(true), layer(false)], &random.normal([72]), head).unwrap()
}

/// Pages full of numbers, the same each time.
fn pages(kind: Kind) -> Pages {
    let random = fixtures::Random::new(6);
    let tensors = || -> Vec<Tensor> { (0..2).map(|_| random.normal([40, 2, 4, 20]).to_kind(kind)).collect() };
    let (keys, values) = (tensors(), tensors());
    Pages::new(&keys, &values).unwrap()
}

/// Logits of two steps of some of twelve rows.
fn logits(decoder: &mut Decoder, kind: Kind, rows: &[usize]) -> Vec<Vec<f32>> {
    let (pages, random) = (pages(kind), fixtures::Random::new(7));
    let x = random.normal([12, 72]);
    let angles = random.normal([12, 10]);
    let chosen = Tensor::from_slice(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>());
    let x = x.index_select(0, &chosen);
    let (cos, sin) = (numbers(&angles.cos().index_select(0, &chosen)), numbers(&angles.sin().index_select(0, &chosen)));
    let tables: Vec<i32> =
        rows.iter().flat_map(|&row| (0..3).map(move |page| ((row * 3 + page) * 7 % 40) as i32)).collect();
    let known = [LoraId::OWN, LoraId::NONE, LoraId::named(1).unwrap(), LoraId::named(0).unwrap()];
    let adapters: Vec<LoraId> = rows.iter().map(|row| known[row % 4]).collect();
    let mut made = Vec::new();
    for step_idx in 0..2 {
        let lens: Vec<i64> = rows.iter().map(|&row| row as i64 * 3 % 11 + step_idx).collect();
        let step = Step { tables: &tables, lens: &lens, cos: &cos, sin: &sin, adapters: &adapters, ..Step::default() };
        made.push(decoder.step(&x, &pages, &step).unwrap());
    }
    let both = Tensor::cat(&made, 1);
    (0..rows.len() as i64).map(|row| numbers(&both.get(row))).collect()
}

#[test]
fn a_rows_result_is_its_own_bit_for_bit() {
    for (width, norms_after) in Width::ALL.into_iter().flat_map(|width| [(width, false), (width, true)]) {
        let mut decoder = decoder(width, norms_after);
        let kind = if width == Width::F32 { Kind::Float } else { Kind::BFloat16 };
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        let all: Vec<usize> = (0..12).collect();
        let expected = logits(&mut decoder, kind, &all);
        assert!(expected.iter().flatten().all(|x| x.is_finite()));
        let mut check = |rows: &[usize]| {
            let found = logits(&mut decoder, kind, rows);
            for (row, found) in rows.iter().zip(&found) {
                assert!(found == &expected[*row], "{width}: row {row} among {rows:?}");
            }
        };
        for rows in
            [&[4][..], &[7, 4], &[11, 0, 4], &[0, 1, 2, 3, 4], &[5, 6, 7, 8, 9, 4, 3], &[4, 8, 0, 3, 2, 1, 7, 6]]
        {
            check(rows);
        }
        for count in [2, 3] {
            tch::set_num_threads(count);
            check(&all);
            check(&[4]);
        }
        tch::set_num_threads(threads);
    }
}

#[test]
fn what_does_not_fit_is_told() -> Result<()> {
    let mut decoder = decoder(Width::F32, false);
    let pages = pages(Kind::Float);
    let x = Tensor::zeros([2, 72], F32);
    let (cos, sin) = ([1.0; 20], [0.0; 20]);
    let step = Step {
        tables: &[0, 1, 2, 3],
        lens: &[5, 2],
        cos: &cos,
        sin: &sin,
        adapters: &[LoraId::OWN, LoraId::NONE],
        ..Step::default()
    };
    let _ = decoder.step(&x, &pages, &step)?;
    for (step, says) in [
        (Step { lens: &[8, 2], ..step }, "row 0 has 9 tokens in 2 pages of 4"),
        (Step { tables: &[0, 40, 2, 3], ..step }, "row 0 has page 40 of 40"),
        (Step { tables: &[0, 1, 2, -1], lens: &[5, 4], ..step }, "row 1 has page -1 of 40"),
        (
            Step { tables: &[0, 1, 1, 0], lens: &[5, 1], ..step },
            "row 1 writes to slot 1 of page 1, as a row before it does",
        ),
        (Step { cos: &cos[1..], ..step }, "a step of 2 rows has 19 cosines and 20 sines, 20 were expected"),
        (Step { ends: &[6, 2], ..step }, "row 1 has 2 tokens before it, and attends to 2"),
        (Step { asked: &[2], ..step }, "logits of row 2 of 2"),
        (Step { lens: &[], adapters: &[], ..step }, "a decoding step without rows"),
    ] {
        assert_eq!(decoder.step(&x, &pages, &step).unwrap_err().to_string(), says);
    }
    let error = decoder.step(&Tensor::zeros([3, 72], F32), &pages, &step).unwrap_err().to_string();
    assert_eq!(error, "x is [3, 72], [2, 72] was expected");
    let error = PackedLinear::new(&Tensor::zeros([3], F32), Width::Int8).unwrap_err().to_string();
    assert_eq!(error, "packing takes a weight [out, in] on the CPU, this is [3] on Cpu");
    let error = PackedLinear::new(&Tensor::zeros([3, 4], F32), Width::F32)?.parts().unwrap_err().to_string();
    assert_eq!(error, "a weight in f32 has no quantised parts");
    Ok(())
}
