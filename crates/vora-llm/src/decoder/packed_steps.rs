//! Packed decoders against the reference and against the plain path, in every architecture: prompts are read token by token.

use fixtures::assert_close_to;
use tch::{Device, Kind, Tensor};
use vora_lora::LoraConfig;
use vora_torch::nn::decode::{LoraId, Pages, Width};
use vora_torch::weights::{Quantization, Weights};

use super::architectures::{gemmas, packed_cases};
use super::{CausalLm, PackedDecoder, PackedStep};
use crate::{AttentionPlan, LlmConfig, VisionAttention};
use vora_text::{Span, Spans};

/// Tokens in a page.
const PAGE_LEN: i64 = 4;
/// Pages of a row.
const ROW_PAGES: usize = 5;

fn pages(config: &LlmConfig, rows: usize, kind: Kind) -> Pages {
    let size = [(rows * ROW_PAGES) as i64, config.kv_heads(), PAGE_LEN, config.head_width()];
    // What is not a row's own must not be looked at.
    let tensors = || -> Vec<Tensor> {
        (0..config.num_hidden_layers).map(|_| Tensor::full(size, f64::NAN, (kind, Device::Cpu))).collect()
    };
    Pages::new(&tensors(), &tensors()).unwrap()
}

/// Some rows of tokens, each as far as it has been read.
struct Rows {
    pages: Pages,
    tables: Vec<[i32; ROW_PAGES]>,
    texts: Vec<Vec<i64>>,
    lens: Vec<usize>,
    adapters: Vec<LoraId>,
}

impl Rows {
    fn new(config: &LlmConfig, kind: Kind, texts: Vec<Vec<i64>>, adapters: Vec<LoraId>) -> Self {
        let rows = texts.len();
        // The pages of all rows mixed.
        let table = |row: usize| std::array::from_fn(|page| ((rows - 1 - row) + rows * (ROW_PAGES - 1 - page)) as i32);
        Self {
            pages: pages(config, rows, kind),
            tables: (0..rows).map(table).collect(),
            lens: vec![0; rows],
            texts,
            adapters,
        }
    }

    /// One token more for the rows that are shorter than `upto` says; logits `[rows, vocab]` of these.
    fn step(&mut self, decoder: &mut PackedDecoder, upto: &[usize]) -> Option<Tensor> {
        let chosen: Vec<usize> = (0..self.lens.len()).filter(|&row| self.lens[row] < upto[row]).collect();
        if chosen.is_empty() {
            return None;
        }
        let of = |value: &dyn Fn(usize) -> i64| chosen.iter().map(|&row| value(row)).collect::<Vec<i64>>();
        let lens = of(&|row| self.lens[row] as i64);
        let step = PackedStep {
            tables: &chosen.iter().flat_map(|&row| self.tables[row]).collect::<Vec<_>>(),
            lens: &lens,
            position_ids: &lens,
            adapters: &chosen.iter().map(|&row| self.adapters[row]).collect::<Vec<_>>(),
            ..PackedStep::default()
        };
        let input_ids = of(&|row| self.texts[row][self.lens[row]]);
        let logits = decoder.decode_step(&input_ids, &self.pages, &step).unwrap();
        for row in chosen {
            self.lens[row] += 1;
        }
        Some(logits)
    }

    /// Logits of each row after `prompts[row]` tokens and after each of `new` more, `[rows, 1 + new, vocab]`
    fn logits(&mut self, decoder: &mut PackedDecoder, prompts: &[usize], new: usize) -> Tensor {
        let before: Vec<usize> = prompts.iter().map(|len| len - 1).collect();
        while self.step(decoder, &before).is_some() {}
        let steps = (0..=new).map(|i| {
            let upto: Vec<usize> = prompts.iter().map(|len| len + i).collect();
            self.step(decoder, &upto).expect("a token more for every row")
        });
        Tensor::stack(&steps.collect::<Vec<_>>(), 1)
    }
}

fn ids(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.contiguous().view([-1])).unwrap()
}

/// Prompts of 5 and 8 tokens and what follows them.
fn texts(prompts: &Tensor, continuation: &Tensor) -> Vec<Vec<i64>> {
    let text =
        |(row, len): (i64, i64)| [ids(&prompts.get(row).narrow(0, 0, len)), ids(&continuation.get(row))].concat();
    [(0, 5), (1, 8)].map(text).to_vec()
}

/// A prompt of one row in pieces that end at `cuts`, of which the last token's logits are asked for each time:
/// `[pieces, vocab]`
fn in_pieces(
    decoder: &mut PackedDecoder,
    config: &LlmConfig,
    kind: Kind,
    embeds: &Tensor,
    cuts: &[i64],
    end_of: &dyn Fn(i64) -> i64,
) -> Tensor {
    let rows = Rows::new(config, kind, vec![Vec::new(); 2], vec![LoraId::OWN; 2]);
    let mut made = Vec::new();
    for piece in cuts.windows(2) {
        let lens: Vec<i64> = (piece[0]..piece[1]).collect();
        let step = PackedStep {
            tables: &rows.tables[1].repeat(lens.len()),
            lens: &lens,
            ends: &lens.iter().map(|&place| end_of(place)).collect::<Vec<_>>(),
            position_ids: &lens,
            adapters: &vec![LoraId::OWN; lens.len()],
            asked: &[lens.len() as i64 - 1],
            ..PackedStep::default()
        };
        made.push(decoder.forward(&embeds.narrow(0, piece[0], lens.len() as i64), &rows.pages, &step).unwrap());
    }
    Tensor::cat(&made, 0)
}

#[test]
fn a_prompt_may_come_in_pieces_of_any_size() {
    for case in packed_cases() {
        for (kind, width) in
            [Kind::Float, Kind::BFloat16].into_iter().flat_map(|kind| Width::ALL.map(|width| (kind, width)))
        {
            let llm = case.load(kind);
            let mut decoder = PackedDecoder::new(&llm, width).unwrap().unwrap();
            let embeds = llm.embed(&case.golden["prompts"].get(1).narrow(0, 0, 8)); // [8, hidden]
            let mut last =
                |cuts: &[i64]| in_pieces(&mut decoder, &case.config, kind, &embeds, cuts, &|place| place + 1).get(-1);
            let expected = last(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
            for cuts in [&[0, 8][..], &[0, 3, 8], &[0, 1, 7, 8]] {
                assert!(last(cuts).equal(&expected), "{} in {width}: {cuts:?}", case.name);
            }
            if (kind, width) == (Kind::Float, Width::F32) {
                assert_close_to(&expected, &case.get("steps").get(1).get(0), 2e-5);
            }
        }
    }
}

#[test]
fn tokens_of_a_picture_attend_to_each_other() {
    let random = fixtures::Random::new(4);
    for case in packed_cases().iter().filter(|case| case.config.sliding_window.is_none()) {
        let llm = case.load(Kind::Float);
        let mut decoder = PackedDecoder::new(&llm, Width::F32).unwrap().unwrap();
        let embeds = random.normal([9, 32]);
        let row = vec![Span::text(1), Span::image(2, 3), Span::text(2)];
        let mode = VisionAttention::Bidirectional;
        let plan = AttentionPlan::new(&Spans::new(vec![row]), mode, Device::Cpu, Kind::Float).unwrap();
        let output = llm.decoder().forward(&embeds.unsqueeze(0), &plan, 0);
        let expected = llm.logits(&output.last_hidden_state.get(0)); // [9, vocab]
        let end_of = |place: i64| if (1..7).contains(&place) { 7 } else { place + 1 };
        for cuts in [&[0, 9][..], &[0, 1, 7, 8, 9], &[0, 7, 9]] {
            let found = in_pieces(&mut decoder, &case.config, Kind::Float, &embeds, cuts, &end_of);
            let at: Vec<i64> = cuts[1..].iter().map(|cut| cut - 1).collect();
            assert_close_to(&found, &expected.index_select(0, &Tensor::from_slice(&at)), 2e-5);
        }
    }
}

/// Root of the mean square of the difference.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    (found - expected).square().mean(Kind::Float).sqrt().double_value(&[])
}

#[test]
fn steps_match_reference() {
    for case in packed_cases() {
        let texts = texts(&case.golden["prompts"], &case.golden["continuation"]);
        let steps = |kind, width| {
            let llm = case.load(kind);
            let mut decoder = PackedDecoder::new(&llm, width).unwrap().unwrap();
            assert_eq!(decoder.num_bytes(), 0, "what has the dtype is shared");
            Rows::new(&case.config, kind, texts.clone(), vec![LoraId::OWN; 2]).logits(&mut decoder, &[5, 8], 4)
        };
        let expected = case.get("steps");
        assert_close_to(&steps(Kind::Float, Width::F32), expected, 2e-5);
        // In bf16 as close as libtorch's operators, which round after each.
        let llm = case.load(Kind::BFloat16);
        let theirs: Vec<Tensor> = texts.iter().map(|text| plain(&llm, text, 4).to_kind(Kind::Float)).collect();
        let theirs = distance(&Tensor::stack(&theirs, 0), expected);
        let ours = distance(&steps(Kind::BFloat16, Width::Bf16), expected);
        assert!(ours < 1.1 * theirs, "{}: {ours} from the reference, libtorch's operators {theirs}", case.name);
    }
}

/// What the plain path gives a whole text at its last tokens, `[1 + new, vocab]`
fn plain(llm: &CausalLm, text: &[i64], new: i64) -> Tensor {
    by_name(llm, text, new, LoraId::OWN)
}

/// The same with this adapter.
fn by_name(llm: &CausalLm, text: &[i64], new: i64, id: LoraId) -> Tensor {
    let plan = AttentionPlan::new(&Spans::text(&[text.len() as i64]), VisionAttention::Causal, Device::Cpu, llm.kind())
        .unwrap();
    let plan = plan.with_lora(id);
    let output = llm.decoder().forward(&llm.embed(&Tensor::from_slice(text).unsqueeze(0)), &plan, 0);
    llm.logits(&output.last_hidden_state.get(0).narrow(0, text.len() as i64 - 1 - new, 1 + new))
}

/// A model whose matrices are what they are in so many bits, head included.
fn quantised(llm: &CausalLm, decoder: &PackedDecoder) -> CausalLm {
    let mut tensors = llm.tensors();
    let layers = decoder.decoder().layers();
    for (name, tensor) in &mut tensors {
        let Some((layer_idx, name)) = name.strip_prefix("model.layers.").and_then(|name| name.split_once('.')) else {
            continue;
        };
        let layer = &layers[layer_idx.parse::<usize>().unwrap()];
        let packed = match name.trim_end_matches(".weight").rsplit('.').next().unwrap() {
            "q_proj" => &layer.q_proj,
            "k_proj" => &layer.k_proj,
            "v_proj" => &layer.v_proj,
            "o_proj" => &layer.o_proj,
            "gate_proj" => &layer.gate_proj,
            "up_proj" => &layer.up_proj,
            "down_proj" => &layer.down_proj,
            _ => continue,
        };
        if name.ends_with(".weight") {
            *tensor = packed.dequantise(0..packed.out_features(), Kind::Float).unwrap();
        }
    }
    let head = decoder.decoder().head();
    tensors.retain(|(name, _)| name != "lm_head.weight");
    tensors.push(("lm_head.weight".to_owned(), head.dequantise(0..head.out_features(), Kind::Float).unwrap()));
    let config = LlmConfig { tie_word_embeddings: false, ..llm.config().clone() };
    CausalLm::load(&config, &Weights::from_tensors(tensors, Device::Cpu, Kind::Float)).unwrap()
}

#[test]
fn few_bits_are_a_model_of_the_weights_that_they_stand_for() {
    for case in packed_cases() {
        let llm = case.load(Kind::Float);
        let texts = texts(&case.golden["prompts"], &case.golden["continuation"]);
        for width in [Width::Int8, Width::Int4] {
            let mut decoder = PackedDecoder::new(&llm, width).unwrap().unwrap();
            let expected: Vec<Tensor> = texts.iter().map(|text| plain(&quantised(&llm, &decoder), text, 4)).collect();
            let mut rows = Rows::new(&case.config, Kind::Float, texts.clone(), vec![LoraId::OWN; 2]);
            let found = rows.logits(&mut decoder, &[5, 8], 4);
            // What is left is the rounding of each product's input to 8 bits.
            let expected = Tensor::stack(&expected, 0);
            let far = distance(&found, &expected) / distance(&expected, &expected.zeros_like());
            assert!(far < 0.08, "{} in {width}: {far}", case.name);
        }
    }
}

/// As a file has them whose matrices are in several widths: each stays in its own.
#[test]
fn widths_may_differ_within_a_layer() {
    for case in packed_cases() {
        let mut llm = case.load(Kind::Float);
        llm.linears_mut(&mut |path, linear| match path.rsplit('.').next() {
            Some("q_proj" | "down_proj") => linear.quantize(Quantization::Int8Groups),
            Some("v_proj" | "up_proj") => linear.quantize(Quantization::Int4Groups),
            _ => Ok(()),
        })
        .unwrap();
        let lora = LoraConfig { lora_alpha: Some(1.0), ..LoraConfig::new(3, 1) };
        llm.linears_mut(&mut |path, linear| {
            linear.attach("own", &lora, &Weights::random(9, Device::Cpu, Kind::Float).pp(path))
        })
        .unwrap(); // of a B that is zero: what it needs is made, and changes nothing
        let mut decoder = PackedDecoder::as_stored(&llm).unwrap().unwrap();
        let layer = &decoder.decoder().layers()[0];
        let widths = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.down_proj].map(|linear| linear.width());
        assert_eq!(widths, [Width::Int8, Width::F32, Width::Int4, Width::Int8]);
        let texts = texts(&case.golden["prompts"], &case.golden["continuation"]);
        let expected: Vec<Tensor> = texts.iter().map(|text| plain(&quantised(&llm, &decoder), text, 4)).collect();
        let expected = Tensor::stack(&expected, 0);
        for id in [LoraId::NONE, LoraId::OWN] {
            let mut rows = Rows::new(&case.config, Kind::Float, texts.clone(), vec![id; 2]);
            let far = distance(&rows.logits(&mut decoder, &[5, 8], 4), &expected)
                / distance(&expected, &expected.zeros_like());
            assert!(far < 0.08, "{}: {far}", case.name);
        }
    }
}

#[test]
fn adapters_act_on_the_rows_that_have_them() {
    for case in packed_cases() {
        let mut llm = case.load(Kind::Float);
        let texts = texts(&case.golden["prompts"], &case.golden["continuation"]);
        let without: Vec<Tensor> = texts.iter().map(|text| plain(&llm, text, 4)).collect();
        let new = Weights::random(9, Device::Cpu, Kind::Float);
        let random = fixtures::Random::new(9);
        let lora = LoraConfig::new(3, case.config.num_hidden_layers as i64);
        llm.linears_mut(&mut |path, linear| {
            linear.attach("sight", &lora, &new.pp(path))?;
            if linear.bias().is_none() && path.ends_with("down_proj") {
                linear.set_bias(random.normal([linear.out_features()]) * 0.1);
            }
            for adapter in linear.adapters() {
                let b = adapter.lora_b().shallow_clone();
                tch::no_grad(|| b.shallow_clone().copy_(&(random.normal(b.size()) * 0.1)));
            }
            Ok(())
        })
        .unwrap();
        let with: Vec<Tensor> = texts.iter().map(|text| plain(&llm, text, 4)).collect();
        // Another one by a name, of another rank and on some of the linears: alone it is the model's own.
        let named = LoraId::named(1).unwrap();
        let lora = LoraConfig { lora_alpha: Some(10.0), ..LoraConfig::new(5, 1) };
        let mut alone = case.load(Kind::Float);
        for (llm, is_named) in [(&mut alone, false), (&mut llm, true)] {
            let random = fixtures::Random::new(10);
            llm.linears_mut(&mut |path, linear| {
                if !path.contains("layers.1.") || path.ends_with("k_proj") {
                    return Ok(());
                }
                linear.attach("named", &lora, &Weights::random(11, Device::Cpu, Kind::Float).pp(path))?;
                let adapter = linear.detach("named")?;
                let b = adapter.lora_b().shallow_clone();
                tch::no_grad(|| b.shallow_clone().copy_(&(random.normal(b.size()) * 0.1)));
                linear.add_named(if is_named { named } else { LoraId::named(0).unwrap() }, adapter);
                Ok(())
            })
            .unwrap();
        }
        let other: Vec<Tensor> = texts.iter().map(|text| by_name(&alone, text, 4, LoraId::named(0).unwrap())).collect();
        assert!(distance(&other[0], &without[0]) > 1e-3, "{}: it changes something", case.name);
        assert!(by_name(&llm, &texts[0], 4, named).equal(&other[0]), "{}: beside the own ones", case.name);
        let mut decoder = PackedDecoder::new(&llm, Width::F32).unwrap().unwrap();
        let (none, own) = (LoraId::NONE, LoraId::OWN);
        for adapters in
            [[own, none], [none, own], [own, own], [none, none], [own, named], [named, none], [named, named]]
        {
            let mut rows = Rows::new(&case.config, Kind::Float, texts.clone(), adapters.to_vec());
            let found = rows.logits(&mut decoder, &[5, 8], 4);
            for (row, id) in adapters.into_iter().enumerate() {
                let expected = match id {
                    LoraId::NONE => &without[row],
                    LoraId::OWN => &with[row],
                    _ => &other[row],
                };
                assert_close_to(&found.get(row as i64), expected, 3e-5);
            }
        }
    }
}

#[test]
fn what_is_not_served_is_left_to_the_plain_path() {
    let mut llm = CausalLm::load(&LlmConfig::tiny(16), &Weights::random(1, Device::Cpu, Kind::Float)).unwrap();
    assert!(PackedDecoder::new(&llm, Width::F32).unwrap().is_some());
    let lora = LoraConfig::new(2, 2);
    llm.linears_mut(&mut |path, linear| {
        let size = [linear.out_features(), linear.in_features()];
        let tensors = [
            (format!("{path}.lora_A.weight"), Tensor::ones([2, size[1]], (Kind::Float, Device::Cpu))),
            (format!("{path}.lora_B.weight"), Tensor::ones([size[0], 2], (Kind::Float, Device::Cpu))),
            (format!("{path}.lora_magnitude_vector"), Tensor::ones([size[0]], (Kind::Float, Device::Cpu))),
        ];
        linear.attach("dora", &lora, &Weights::from_tensors(tensors, Device::Cpu, Kind::Float).pp(path))
    })
    .unwrap();
    assert!(PackedDecoder::new(&llm, Width::F32).unwrap().is_none());
    for case in gemmas() {
        for width in Width::ALL {
            assert!(PackedDecoder::new(&case.load(Kind::Float), width).unwrap().is_none(), "{} in {width}", case.name);
        }
    }
}
