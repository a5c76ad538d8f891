//! The engine against one request at a time without a cache of pages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixtures::Random;
use tch::{Device, Kind, Tensor};
use vora_image::{Aspect, ImageProcessor, Resample, TokenBudget};
use vora_llm::LlmConfig;
use vora_lora::{ActsOn, LoraConfig};
use vora_model::{Chameleon, Gemma4UnifiedConfig, VisionLanguageModel, Vora, VoraConfig};
use vora_text::{ChatTemplate, Part, Tokenizer};
use vora_torch::weights::{Quantization, Weights};

use super::*;
use crate::generation_config::GenerationConfig;
use crate::prompter::Prompter;
use crate::{
    Assistant, FinishReason, InferError, Message, OutputModality, Passage, Request, RgbImage, SamplingParams, Width,
};

/// A model of random weights that sees up to 16 patches in a picture's own shape, with the tiny tokenizer; `acts_on` puts adapters on it.
fn assistant(acts_on: Option<ActsOn>) -> Assistant {
    let folder = fixtures::root().join("tiny/llm");
    let llm = LlmConfig::open(&folder).unwrap();
    let weights = Weights::random(9, Device::Cpu, Kind::Float);
    let mut model = Vora::load(VoraConfig::new(llm, 24, 4, 16), &weights).unwrap();
    if let Some(acts_on) = acts_on {
        let random = Random::new(3);
        let lora = LoraConfig { acts_on, ..LoraConfig::new(4, 3) };
        let adapters = Weights::random(5, Device::Cpu, Kind::Float);
        model.attach("seeing", &lora, &adapters).unwrap();
        for (_, tensor) in adapters.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
            tch::no_grad(|| tensor.shallow_clone().copy_(&(random.normal(tensor.size()) * 0.2)));
        }
    }
    let budget = TokenBudget::new(4, 4, 16).unwrap();
    let processor = ImageProcessor::square(16, [0.5; 3], [0.5; 3], Resample::Bilinear);
    let processor = processor.with_aspect(16, Aspect::Keep(budget));
    let (tokenizer, chat) = (Tokenizer::open(&folder).unwrap(), ChatTemplate::open(&folder).unwrap());
    let prompter = Prompter::new(tokenizer, chat, Some(processor));
    Assistant { model: Box::new(model), prompter, generation: GenerationConfig::default(), adapters: Vec::new() }
}

fn picture(seed: u8) -> RgbImage {
    shaped(seed, 16, 16)
}

fn shaped(seed: u8, width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| [(x * 16) as u8 ^ seed, (y * 16) as u8, seed.wrapping_mul(37)].into())
}

fn request(i: usize) -> Request<'static> {
    const SHAPES: [(u32, u32); 4] = [(16, 16), (24, 8), (9, 30), (60, 12)];
    let picture = |p: usize| shaped((i * 5 + p) as u8, SHAPES[(i + p) % 4].0, SHAPES[(i + p) % 4].1);
    let pictures: Vec<RgbImage> = (0..i % 3).map(picture).collect();
    let words = ["Is it red?", "What stands left of the ring, and what colour has it?", "Why?"][i % 3];
    let sampling = match i % 4 {
        0 => SamplingParams::default(),
        1 => SamplingParams::default().with_temperature(0.9).with_seed(i as u64),
        2 => SamplingParams::default().with_temperature(1.3).with_top_k(30).with_presence_penalty(0.5),
        _ => SamplingParams::default().with_repetition_penalty(1.4),
    };
    Request::question(pictures, words).with_sampling(sampling).with_max_new_tokens(3 + 5 * (i % 5))
}

#[derive(Debug, PartialEq)]
struct Told {
    text: String,
    reason: FinishReason,
    tokens: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
}

fn told(events: impl Iterator<Item = Event>) -> Result<Told, String> {
    let mut told =
        Told { text: String::new(), reason: FinishReason::Stop, tokens: 0, prompt_tokens: 0, cached_tokens: 0 };
    let mut ended = false;
    for event in events {
        assert!(!ended, "{event:?} after the end");
        match event {
            Event::Started { prompt_tokens, cached_tokens, .. } => {
                (told.prompt_tokens, told.cached_tokens) = (prompt_tokens, cached_tokens);
            }
            Event::Text { text, .. } => told.text.push_str(&text),
            Event::Image(image) => panic!("a picture of {:?}", image.dimensions()),
            Event::Finished { reason, completion_tokens } => {
                (told.reason, told.tokens, ended) = (reason, completion_tokens, true);
            }
            Event::Failed(error) => return Err(format!("{error:#}")),
        }
    }
    assert!(ended);
    Ok(told)
}

fn start(assistant: Assistant, config: EngineConfig) -> Engine {
    Engine::start(assistant, config).unwrap()
}

/// Weights that the engine brings into few bits are those that a model has in them already.
#[test]
fn few_bits_are_the_same_however_they_came() {
    for (width, quantization) in [(Width::Int8, Quantization::Int8Groups), (Width::Int4, Quantization::Int4Groups)] {
        let mut stored = assistant(Some(ActsOn::All));
        stored.model.adapted_mut().quantize(quantization).unwrap();
        let stored = start(stored, EngineConfig::default());
        let brought = start(assistant(Some(ActsOn::All)), EngineConfig::default().with_width(width));
        for i in 0..6 {
            let of = |engine: &Engine| told(engine.stream(request(i)).unwrap()).unwrap();
            assert_eq!(of(&stored), of(&brought), "{width}, request {i}");
        }
    }
    let mut four = assistant(None);
    four.model.adapted_mut().quantize(Quantization::Int4Groups).unwrap();
    let error = Engine::start(four, EngineConfig::default().with_width(Width::Int8)).unwrap_err();
    let said = format!("{error:#}");
    assert!(said.contains("q_proj.weight: it is in few bits already, of another kind"), "{said}");
    let error = Engine::start(assistant(None), EngineConfig::default().with_cache_bytes(1 << 60)).unwrap_err();
    assert!(error.to_string().contains("bytes of memory are left"), "{error}");
}

/// Small chunks, few pages, several at once, found beginnings: each answer as if it were alone.
#[test]
fn every_answer_is_as_if_it_were_alone() {
    for acts_on in [None, Some(ActsOn::All), Some(ActsOn::WithImage), Some(ActsOn::ImageTokens)] {
        let alone = assistant(acts_on);
        let expected: Vec<_> = (0..12).map(|i| alone.reply(&request(i), |_| true).unwrap()).collect();
        for prefix_caching in [true, false] {
            let config = EngineConfig { max_batch: 5, prefill_chunk: 7, prefix_caching, ..EngineConfig::default() };
            let engine = start(assistant(acts_on), EngineConfig { cache_bytes: 1 << 19, ..config });
            for round in 0..2 {
                let streams: Vec<_> = (0..12).map(|i| engine.stream(request(i)).unwrap()).collect();
                for (i, (stream, expected)) in streams.into_iter().zip(&expected).enumerate() {
                    let told = told(stream).unwrap();
                    let of = format!("{acts_on:?}, request {i}, round {round}, {prefix_caching}");
                    assert_eq!(told.text, expected.text, "{of}");
                    assert_eq!(told.tokens, expected.generated.ids.len(), "{of}");
                    assert_eq!(told.reason, expected.generated.finish_reason, "{of}");
                    assert_eq!(told.prompt_tokens as i64, expected.generated.prompt_tokens, "{of}");
                    let is_found = round == 1 && prefix_caching && told.prompt_tokens > 16;
                    assert!(told.cached_tokens > 0 || !is_found, "{of}");
                    assert!(told.cached_tokens == 0 || prefix_caching, "{of}");
                }
            }
            engine.finish();
            let stats = engine.stats();
            assert_eq!((stats.ended, stats.failed, stats.cancelled), (24, 0, 0));
            assert_eq!((stats.waiting, stats.running, stats.used_pages), (0, 0, 0));
            assert!(stats.cached_tokens > 0 || !prefix_caching);
        }
    }
}

/// With the adapters off the model is the one that it was, whatever others ask of it.
#[test]
fn a_request_may_leave_the_adapters_off() {
    let plain = assistant(None);
    let engine = start(assistant(Some(ActsOn::All)), EngineConfig::default());
    let streams: Vec<_> = (0..8)
        .map(|i| engine.stream(if i % 2 == 0 { request(i).without_adapters() } else { request(i) }).unwrap())
        .collect();
    let mut differ = 0;
    for (i, stream) in streams.into_iter().enumerate() {
        let (told, expected) = (told(stream).unwrap().text, plain.reply(&request(i), |_| true).unwrap().text);
        assert!(i % 2 == 1 || told == expected, "{i}");
        differ += usize::from(told != expected);
    }
    assert!(differ > 0, "the adapters change nothing");
}

#[test]
fn a_conversation_goes_on_from_what_was_computed() {
    let engine = start(assistant(None), EngineConfig::default());
    let mut messages = vec![Message::question_about(1, "Is it red, or is it blue?")];
    let ask = |messages: &[Message], seed| {
        let request = Request::new(vec![picture(seed)], messages.to_vec()).with_max_new_tokens(20);
        told(engine.stream(request).unwrap()).unwrap()
    };
    let first = ask(&messages, 1);
    assert_eq!(first.cached_tokens, 0);
    let other = ask(&messages, 2); // the same words about another picture
    assert_eq!(other.cached_tokens, 0);
    messages.extend([Message::new("assistant", first.text.clone()), Message::new("user", "Why?")]);
    let second = ask(&messages, 1);
    assert!(second.cached_tokens as i64 >= first.prompt_tokens as i64 / 16 * 16, "{first:?} {second:?}");
}

#[test]
fn what_is_taken_back_leaves_its_pages() {
    let engine = start(assistant(None), EngineConfig { max_batch: 2, ..EngineConfig::default() });
    let long = || Request::question(vec![picture(1)], "Why?").with_max_new_tokens(400);
    let mut streams: Vec<_> = (0..5).map(|_| engine.stream(long()).unwrap()).collect();
    assert!(matches!(streams[0].next(), Some(Event::Started { .. })));
    streams.clear();
    let start = Instant::now();
    while engine.stats().ended < 5 {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(2));
    }
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.used_pages, stats.waiting, stats.running), (5, 0, 0, 0));
    assert!(stats.generated_tokens < 5 * 400);
}

#[test]
fn an_engine_that_is_dropped_ends_at_once() {
    let engine = start(assistant(None), EngineConfig::default());
    let long = Request::question(vec![picture(1)], "Why?").with_max_new_tokens(450);
    let mut streams: Vec<_> = (0..4).map(|_| engine.stream(long.clone()).unwrap()).collect();
    assert!(matches!(streams[0].next(), Some(Event::Started { .. })));
    let counts = engine.counts();
    drop(engine);
    assert_eq!((counts.stats().running, counts.stats().waiting), (0, 0));
    for stream in streams {
        assert!(!stream.into_iter().any(|event| matches!(event, Event::Finished { .. })));
    }
}

#[test]
fn stops_and_logarithms_are_given() {
    let alone = assistant(None);
    let question = || Request::question(vec![picture(4)], "Why?").with_max_new_tokens(30);
    let whole = alone.reply(&question(), |_| true).unwrap().text;
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 3].iter().collect();
    let before = &whole[..whole.find(&stop).unwrap()];
    let engine = start(assistant(None), EngineConfig::default());
    let stopped = told(engine.stream(question().with_stop(vec!["never".into(), stop])).unwrap()).unwrap();
    assert_eq!((stopped.text.as_str(), stopped.reason), (before, FinishReason::Stop));
    // Bytes of all tokens are the text; greedy takes the likeliest each time.
    let events = engine.stream(question().with_logprobs(2)).unwrap();
    let mut bytes = Vec::new();
    for event in events {
        let Event::Text { tokens, .. } = event else { continue };
        for token in tokens {
            assert_eq!((token.top.len(), token.top[0].0, token.top[0].2), (2, token.id, token.logprob));
            assert!(token.logprob <= 0.0 && token.top[1].2 <= token.logprob);
            bytes.extend(token.bytes);
        }
    }
    assert_eq!(String::from_utf8_lossy(&bytes), whole);
}

/// A Chameleon's pictures come whole, between its words, as they come one request at a time.
#[test]
fn pictures_are_written() {
    let model = || {
        let text = std::fs::read(fixtures::root().join("golden/chameleon.json")).unwrap();
        let config = serde_json::from_slice::<BTreeMap<String, LlmConfig>>(&text).unwrap().remove("pre").unwrap();
        let config = LlmConfig { vocab_size: 512, max_position_embeddings: 200, ..config };
        Chameleon::load(&config, &Weights::random(4, Device::Cpu, Kind::Float)).unwrap()
    };
    let folder = fixtures::root().join("tiny/llm");
    let prompter = Prompter::new(Tokenizer::open(&folder).unwrap(), ChatTemplate::open(&folder).unwrap(), None);
    let alone =
        Assistant { model: Box::new(model()), prompter, generation: GenerationConfig::default(), adapters: Vec::new() };
    let request = |seed| {
        let sampling = SamplingParams::default().with_temperature(2.0).with_seed(seed);
        Request::question(vec![], "A red ring.").with_sampling(sampling).with_max_new_tokens(60)
    };
    let prompter = Prompter::new(Tokenizer::open(&folder).unwrap(), ChatTemplate::open(&folder).unwrap(), None);
    let engine = start(
        Assistant { model: Box::new(model()), prompter, generation: GenerationConfig::default(), adapters: Vec::new() },
        EngineConfig::default(),
    );
    let (mut pictures, mut words) = (0, 0);
    for (seed, modality) in (0..6).flat_map(|seed| [(seed, OutputModality::Image), (seed, OutputModality::Interleaved)])
    {
        let (mut images, mut text) = (Vec::new(), String::new());
        for event in engine.stream(request(seed).with_modality(modality)).unwrap() {
            match event {
                Event::Image(image) => images.push(image),
                Event::Text { text: new, .. } => text.push_str(&new),
                Event::Failed(error) => panic!("{error:#}"),
                _ => {}
            }
        }
        let expected = alone.write(&request(seed), modality).unwrap();
        let of = |passage: &Passage| if let Passage::Image(image) = passage { Some(image.clone()) } else { None };
        assert_eq!(images, expected.iter().filter_map(of).collect::<Vec<_>>(), "{seed} {modality:?}");
        let ids: Vec<i64> =
            expected.iter().flat_map(|p| if let Passage::Text(ids) = p { ids.clone() } else { vec![] }).collect();
        assert_eq!(text, alone.tokenizer().decode(&ids, true).unwrap(), "{seed} {modality:?}");
        (pictures, words) = (pictures + images.len(), words + ids.len());
    }
    assert!(pictures >= 6 && words > 0, "{pictures} pictures, {words} words");
    let engine = start(assistant(None), EngineConfig::default());
    let error = told(engine.stream(request(0).with_modality(OutputModality::Image)).unwrap()).unwrap_err();
    assert_eq!(error, "the model writes no pictures; a Chameleon does");
}

#[test]
fn what_cannot_be_answered_is_told_at_once_or_in_place_of_a_start() {
    let config = EngineConfig { max_waiting: 2, max_batch: 1, cache_bytes: 1 << 17, ..EngineConfig::default() };
    let engine = Arc::new(start(assistant(None), config));
    let refused = |request| engine.stream(request).err().map(|error| error.downcast::<InferError>().unwrap());
    let flat = RgbImage::new(0, 5);
    assert!(matches!(refused(Request::question(vec![flat], "Why?")), Some(InferError::BadImage { index: 0, .. })));
    let hot = Request::question(vec![], "Why?").with_sampling(SamplingParams::default().with_temperature(-1.0));
    assert!(engine.stream(hot).err().unwrap().to_string().starts_with("temperature"));
    let long = Request::question(vec![], &"Why? ".repeat(600));
    assert!(told(engine.stream(long).unwrap()).unwrap_err().contains("the model's context is 512"));
    let most = Request::question(vec![], "Why?").with_max_new_tokens(400);
    let error = told(engine.stream(most).unwrap()).unwrap_err();
    assert!(error.contains("the cache of keys and values holds"), "{error}");
    let unequal = Request::new(vec![picture(0)], vec![Message::new("user", "Why?")]);
    assert!(told(engine.stream(unequal).unwrap()).unwrap_err().contains("1 pictures for 0 image places"));

    let busy = || Request::question(vec![], "Why?").with_max_new_tokens(100);
    let streams: Vec<_> = (0..20).map(|_| engine.stream(busy())).collect();
    let full = streams.iter().filter_map(|stream| stream.as_ref().err());
    let full: Vec<_> = full.map(|error| error.downcast_ref::<InferError>().unwrap()).collect();
    assert!(!full.is_empty() && full.iter().all(|error| matches!(error, InferError::QueueFull { waiting: 2.. })));
    drop(streams);
    engine.finish();
    assert_eq!(refused(busy()), Some(InferError::Ending));
}

/// What libtorch throws ends one request.
#[test]
fn an_exception_in_the_model_ends_the_request_alone() {
    let mut broken = assistant(None);
    let whole = broken.reply(&request(0), |_| true).unwrap().text;
    // The patch embedding has other sizes than the processor makes.
    broken.prompter = Prompter::new(
        Tokenizer::open(&fixtures::root().join("tiny/llm")).unwrap(),
        ChatTemplate::open(&fixtures::root().join("tiny/llm")).unwrap(),
        Some(ImageProcessor::square(18, [0.5; 3], [0.5; 3], Resample::Bilinear)),
    );
    let engine = start(broken, EngineConfig::default());
    let seeing = engine.stream(request(1)).unwrap();
    assert!(told(seeing).is_err());
    assert_eq!(told(engine.stream(request(0)).unwrap()).unwrap().text, whole);
    assert_eq!((engine.stats().failed, engine.stats().used_pages), (1, 0));
    let _ = Tensor::zeros([1], (Kind::Float, Device::Cpu)); // libtorch goes on
}

/// HF's ids and greedy answers: of words, a picture of 1:3, several turns and pictures; alone, and from the engine.
#[test]
fn a_gemma_4_is_asked_and_answers_as_in_transformers() {
    let folder = fixtures::root().join("tiny/gemma4");
    let open =
        || Assistant::open(&folder, Device::Cpu, Kind::Float, &|name| anyhow::bail!("{name} is nowhere")).unwrap();
    let (alone, config) = (open(), EngineConfig { prefill_chunk: 7, ..EngineConfig::default() });
    let engine = start(open(), config);
    let bytes = &fixtures::arrays("gemma4_unified")["processor.asked.bytes"]; // [height, width, 3]
    let picture = RgbImage::from_raw(bytes.shape[1] as u32, bytes.shape[0] as u32, bytes.bytes()).unwrap();
    let golden = std::fs::read(fixtures::root().join("golden/gemma4_unified.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    for prompt in golden["prompts"].as_array().unwrap() {
        let part = |part: &serde_json::Value| part["text"].as_str().map_or(Part::Image, |text| Part::Text(text.into()));
        let message = |message: &serde_json::Value| {
            let content = message["content"].as_array().unwrap().iter().map(part).collect();
            Message::of_parts(message["role"].as_str().unwrap(), content)
        };
        let messages: Vec<Message> = prompt["messages"].as_array().unwrap().iter().map(message).collect();
        let pictures =
            messages.iter().flat_map(|message| &message.content).filter(|part| **part == Part::Image).count();
        let request = Request::new(vec![picture.clone(); pictures], messages).with_max_new_tokens(8);

        let input = alone.prompter.prompt(&request).unwrap().input(&*alone.model).unwrap();
        let image_token_id = Gemma4UnifiedConfig::open(&folder).unwrap().image_token_id;
        let expected = prompt["input_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap());
        let expected: Vec<i64> = expected.map(|id| if id == image_token_id { 0 } else { id }).collect();
        assert_eq!(Vec::<i64>::try_from(input.input_ids.get(0)).unwrap(), expected);
        assert_eq!(alone.reply(&request, |_| true).unwrap().text, prompt["answer"].as_str().unwrap());
        assert_eq!(told(engine.stream(request).unwrap()).unwrap().text, prompt["answer"].as_str().unwrap());
    }
}
