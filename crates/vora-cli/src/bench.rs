//! `vora bench`: how fast a model answers.

use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use comfy_table::{Table, presets};
use serde_json::json;
use vora_infer::{Engine, EngineConfig, Event, InferError, Message, Request, RgbImage, SamplingParams, Width};
use vora_torch::runtime;

use crate::model::ModelArgs;
use crate::size;

/// Measure how fast a model answers: the time to the first token, and tokens a second, of so many requests at once.
///
/// Every request has a prompt of its own, of which nothing is found in the cache. The likeliest token is taken each time and none
/// ends an answer early. Medians of several rounds.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora bench runs/scenes/merged
  vora bench HuggingFaceTB/SmolLM2-135M-Instruct --batch 1,4,16 --prompt 1024 --new 64 --json
  vora bench runs/scenes/merged --weights int4
  vora bench HuggingFaceTB/SmolLM2-135M-Instruct --lora-modules a=adapters/a b=adapters/b --adapter a,b,base")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Requests at once, one measurement for each number
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8])]
    batch: Vec<usize>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 288)]
    prompt: usize,
    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    new: usize,
    /// What the weights are brought into: f32, bf16, int8 or int4 (on a CPU); else as they are
    #[arg(long, value_name = "WIDTH", value_parser = Width::parse)]
    weights: Option<Width>,
    /// Which of --lora-modules answer, the requests of a batch in turn; `base` is none
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    adapter: Vec<String>,
    /// Rounds, whose medians are told; one more before them warms up
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Memory for keys and values
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::bytes)]
    cache: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Requests at once at most: each is a prompt and a stream of its own.
const MOST_AT_ONCE: usize = 4096;

/// Words that most tokenizers have a token for.
const WORDS: [&str; 12] =
    [" red", " blue", " green", " the", " a", " ring", " left", " right", " top", " of", " and", " is"];

/// What so many requests at once took.
#[derive(Debug, Clone, Copy)]
struct Measured {
    first: f64, // seconds to the first token, the median request's
    each: f64,  // tokens a second of one request, after its first
    all: f64,   // tokens a second of all together, from the first request to the last token
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let most = args.batch.iter().copied().max().unwrap_or(0);
    ensure!(!args.batch.contains(&0) && most > 0, "--batch has a 0: no request would be asked");
    ensure!(args.new > 1, "--new is {}, it must be 2 or more", args.new);
    ensure!(most <= MOST_AT_ONCE, "--batch is {most}, it must be {MOST_AT_ONCE} or less");
    ensure!((1..=1000).contains(&args.rounds), "--rounds is {}, it must be 1 to 1000", args.rounds);
    let mut config = EngineConfig::default();
    (config.max_batch, config.max_waiting) = (most, most);
    config.width = args.weights;
    (config.cache_bytes, config.prefix_caching) = (usize::try_from(args.cache)?, false);
    let assistant = args.model.open()?;
    let llm = assistant.model().llm();
    let (device, dtype) = (format!("{:?}", llm.device()), format!("{:?}", llm.kind()));
    let context = llm.config().max_position_embeddings;
    ensure!((args.prompt as i64) < context, "--prompt is {}, the model's context is {context} tokens", args.prompt);
    let engine = Engine::start(assistant, config)?;
    let words = words(&engine, args.prompt)?;
    let prompt_tokens = prompt_tokens(&engine, words)?;

    let mut rows = Vec::new();
    let mut seed = 0;
    for &batch in &args.batch {
        let mut rounds = Vec::new();
        for round in 0..=args.rounds {
            let measured = measure(&engine, &args.adapter, batch, words, args.new, &mut seed)?;
            if round > 0 {
                rounds.push(measured);
            }
        }
        let median = |of: fn(&Measured) -> f64| median(rounds.iter().map(of).collect());
        let measured = Measured {
            first: median(|m| m.first),
            each: median(|m| m.each),
            all: median(|m| m.all),
            seconds: median(|m| m.seconds),
        };
        rows.push((batch, measured));
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let batches = rows.iter().map(|(batch, measured)| {
            json!({
                "batch": batch,
                "first_token_seconds": measured.first,
                "tokens_per_second_each": measured.each,
                "tokens_per_second": measured.all,
                "seconds": measured.seconds,
            })
        });
        let report = json!({
            "model": args.model.short_name(), "device": device, "dtype": dtype, "threads": runtime::threads(),
            "adapters": args.adapter, "prompt_tokens": prompt_tokens, "new_tokens": args.new, "rounds": args.rounds,
            "batches": batches.collect::<Vec<_>>(),
        });
        writeln!(out, "{report}")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header([
        "at once",
        "first token",
        "tokens/s each",
        "tokens/s together",
    ]);
    for (batch, measured) in rows {
        let Measured { first, each, all, .. } = measured;
        table.add_row([batch.to_string(), format!("{first:.3} s"), format!("{each:.1}"), format!("{all:.1}")]);
    }
    let threads = runtime::threads();
    writeln!(out, "{prompt_tokens} tokens of prompt, {} of answer, {dtype} on {device}, {threads} threads", args.new)?;
    writeln!(out, "{table}")?;
    Ok(ExitCode::SUCCESS)
}

/// Asks so many at once.
fn measure(
    engine: &Engine,
    adapters: &[String],
    batch: usize,
    words: usize,
    new: usize,
    seed: &mut usize,
) -> Result<Measured> {
    let eos: Vec<(i64, f32)> = engine.tokenizer().eos_ids().iter().map(|&id| (id, f32::NEG_INFINITY)).collect();
    let sampling = SamplingParams::default().with_logit_bias(eos);
    let (events, of_events) = mpsc::channel();
    let start = Instant::now();
    let mut tickets = Vec::new();
    for at in 0..batch {
        *seed += 1;
        let request = request(words, *seed).with_sampling(sampling.clone()).with_max_new_tokens(new).with_logprobs(0);
        let request = match adapters.get(at % adapters.len().max(1)).map(String::as_str) {
            None => request,
            Some("base") => request.without_adapters(),
            Some(name) => request.with_adapter(name),
        };
        let events = events.clone();
        // With log-probabilities every token is told of, also one that completes no character.
        tickets.push(engine.submit(request, move |event| drop(events.send((at, Instant::now(), event))))?);
    }
    drop(events);
    let mut firsts: Vec<Option<Instant>> = vec![None; batch];
    let mut each = Vec::new();
    let mut end = start;
    for (at, time, event) in of_events {
        match event {
            Event::Text { .. } => drop(firsts[at].get_or_insert(time)),
            Event::Finished { completion_tokens, .. } => {
                ensure!(
                    completion_tokens == new,
                    "an answer ended after {completion_tokens} tokens, where prompt and answer fill the model's context: --new \
                     and --prompt take fewer"
                );
                let took = firsts[at].map_or(Duration::ZERO, |first| time - first);
                each.push((new - 1) as f64 / took.as_secs_f64());
                end = time;
            }
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    let seconds = (end - start).as_secs_f64();
    let firsts = firsts.into_iter().flatten().map(|first| (first - start).as_secs_f64()).collect();
    Ok(Measured { first: median(firsts), each: median(each), all: (batch * new) as f64 / seconds, seconds })
}

/// A request whose text differs from that of every other seed in its first words.
fn request(words: usize, seed: usize) -> Request<'static> {
    let word = |at: usize| WORDS[(seed >> (at * 3).min(60)).wrapping_add(at * 7 + seed) % WORDS.len()];
    let text: String = (0..words).map(word).collect();
    Request::new(Vec::<RgbImage>::new(), vec![Message::new("user", text)])
}

/// How many words make a prompt of so many tokens, or come near to it.
fn words(engine: &Engine, tokens: usize) -> Result<usize> {
    let mut words = tokens;
    for _ in 0..8 {
        let found = match prompt_tokens(engine, words) {
            Err(error) => match error.downcast_ref() {
                Some(&InferError::PromptTooLong { tokens, .. }) => usize::try_from(tokens)?, // the template's own tokens
                _ => return Err(error),
            },
            found => found?,
        };
        if found == tokens {
            break;
        }
        words = (words + tokens).saturating_sub(found).max(1);
    }
    Ok(words)
}

fn prompt_tokens(engine: &Engine, words: usize) -> Result<usize> {
    let mut events = engine.stream(request(words, 1).with_max_new_tokens(1))?;
    match events.next() {
        Some(Event::Started { prompt_tokens, .. }) => Ok(prompt_tokens),
        Some(Event::Failed(error)) => Err(error),
        _ => Err(anyhow!("the model did not start")),
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
