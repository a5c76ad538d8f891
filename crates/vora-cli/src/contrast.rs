//! `vora data contrast`: yes/no questions about captions, each caption asked about its own picture and about another one.

use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use vora_files::{read_text, write_bytes};

use crate::model::ensure_apart;

/// Make yes/no questions of captions: each caption is asked about its own picture, and about another.
///
/// Where all pictures have as many captions and no two the same, each is right as often as it is wrong, so that whoever does not
/// see the picture knows nothing. A caption that is one of the picture's own, in other letters or points too, is never asked as wrong. Pictures are named as in the file, and none is copied: what reads it is told the same folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora data contrast photos/captions.jsonl --out photos/contrast.jsonl
  vora data contrast photos_eval/captions.jsonl --out contrast.jsonl --captions 5
  vora eval runs/photos/final --data contrast.jsonl --images photos_eval --task yesno

FILE is JSON lines or one JSON array. A record names one picture (`frames`, `images` or `image`) and has `captions`,
`caption`, or a conversation whose first answer is one; a picture's captions are those of all its records.")]
pub(crate) struct Contrast {
    /// Pictures with captions
    file: PathBuf,
    /// The file of questions, a conversation a line as for training
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Captions of a picture that are asked about, each twice
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    captions: u64,
    /// Decides whose captions are the wrong ones
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A picture as its records name it, and what is said of it.
struct Captioned {
    key: &'static str,
    picture: Value,
    captions: Vec<String>,
}

impl Contrast {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        ensure_apart(&self.out, &[&self.file])?;
        let read = || captioned(&read_text(&self.file)?);
        let pictures = read().with_context(|| self.file.display().to_string())?;
        let questions = questions(&pictures, usize::try_from(self.captions)?, self.seed)
            .with_context(|| self.file.display().to_string())?;
        let lines: String = questions.iter().map(|question| format!("{question}\n")).collect();
        write_bytes(&self.out, lines.as_bytes())?;
        let (n, from) = (questions.len(), pictures.len());
        writeln!(std::io::stdout(), "{n} questions about {from} pictures: {}", self.out.display())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The pictures of a file, each once.
fn captioned(text: &str) -> Result<Vec<Captioned>> {
    let records: Vec<Value> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text)?
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(k, line)| serde_json::from_str(line).with_context(|| format!("line {}", k + 1)))
            .collect::<Result<_>>()?
    };
    let mut pictures: Vec<Captioned> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for (k, record) in records.iter().enumerate() {
        let one = Captioned::of(record).with_context(|| format!("record {}", k + 1))?;
        match places.get(&one.picture.to_string()) {
            Some(&place) => pictures[place].captions.extend(one.captions),
            None => {
                places.insert(one.picture.to_string(), pictures.len());
                pictures.push(one);
            }
        }
    }
    Ok(pictures)
}

impl Captioned {
    fn of(record: &Value) -> Result<Self> {
        let object: &Map<String, Value> = record.as_object().context("it is not a JSON object")?;
        let given = |key: &&str| object.get(*key).is_some_and(|value| !value.is_null());
        let key = ["frames", "images", "image"].into_iter().find(given);
        let key = key.context("it names no picture (`frames`, `images` or `image`)")?;
        let picture = object[key].clone();
        let count = picture.as_array().map_or(1, Vec::len);
        ensure!(count == 1, "it names {count} pictures, a caption is about one");
        let texts = |value: &Value| match value {
            Value::String(text) => vec![text.clone()],
            Value::Array(texts) => texts.iter().filter_map(|text| Some(text.as_str()?.to_owned())).collect(),
            _ => Vec::new(),
        };
        let said = |key: &str| object.get(key).map(texts).unwrap_or_default();
        let answer = || {
            let turns = object.get("conversations").or_else(|| object.get("messages"))?.as_array()?;
            let is =
                |turn: &&Value| ["gpt", "assistant"].iter().any(|role| turn["from"] == *role || turn["role"] == *role);
            let turn = turns.iter().find(is)?;
            Some(texts(turn.get("value").or_else(|| turn.get("content"))?))
        };
        let found = [said("captions"), said("caption")].into_iter().find(|captions| !captions.is_empty());
        let captions = found.or_else(answer).unwrap_or_default();
        let captions: Vec<_> =
            captions.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect();
        ensure!(!captions.is_empty(), "it has no caption (`captions`, `caption`, or an answer in its conversation)");
        let mark = captions.iter().find(|text| text.contains("<image>"));
        ensure!(mark.is_none(), "its caption {:?} has a picture's place in it", mark.map_or("", String::as_str));
        Ok(Self { key, picture, captions })
    }
}

/// A caption but for its letters' case, spaces and points.
fn words(caption: &str) -> Vec<String> {
    let words = caption.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// A record for every caption and its own picture, and one for it and another: that of a picture as far away for all, or the first
/// behind it that says something else.
fn questions(pictures: &[Captioned], most: usize, seed: u64) -> Result<Vec<Value>> {
    let n = pictures.len() as u64;
    if n < 2 {
        bail!("it has captions of {n} pictures, a contrast takes two");
    }
    let mut questions = Vec::new();
    for (place, own) in pictures.iter().enumerate() {
        let said: HashSet<_> = own.captions.iter().map(|caption| words(caption)).collect();
        for number in 0..own.captions.len().min(most) {
            let away = mixed(seed, number as u64) % (n - 1);
            let others =
                (0..n - 1).map(|further| &pictures[((place as u64 + 1 + (away + further) % (n - 1)) % n) as usize]);
            let mut captions = others.map(|other| &other.captions[number % other.captions.len()]);
            let wrong = captions.find(|caption| !said.contains(&words(caption)));
            let wrong = wrong.with_context(|| {
                format!("all other pictures have captions of {} too, none is wrong of it", own.picture)
            })?;
            for (caption, answer) in [(&own.captions[number], "yes"), (wrong, "no")] {
                questions.push(json!({
                    "id": format!("{place}-{number}-{answer}"),
                    own.key: own.picture,
                    "conversations": [
                        {"from": "human", "value": format!(
                            "<image>\nDoes this caption describe the image? \"{caption}\" Answer yes or no."
                        )},
                        {"from": "gpt", "value": answer},
                    ],
                }));
            }
        }
    }
    Ok(questions)
}

/// SplitMix64 of both.
fn mixed(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const FILE: &str = r#"{"frames": ["a.jpg"], "captions": ["A.", "Also a."]}

{"image": "b.jpg", "caption": "B."}
{"images": ["c.jpg"], "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": " C. "}]}
{"image": "b.jpg", "caption": "Also b."}
{"frames": ["d.jpg"], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "D."}]}"#;

    #[test]
    fn every_caption_is_right_as_often_as_it_is_wrong() {
        for seed in 0..5 {
            let pictures = captioned(FILE).unwrap();
            assert_eq!(pictures.len(), 4);
            let questions = questions(&pictures, 1, seed).unwrap();
            assert_eq!(questions.len(), 8);
            let mut answers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for question in &questions {
                let asked = question["conversations"][0]["value"].as_str().unwrap();
                assert!(asked.starts_with("<image>\nDoes this caption describe the image? \""), "{asked}");
                answers.entry(asked).or_default().push(question["conversations"][1]["value"].as_str().unwrap());
            }
            assert!(answers.len() == 4 && answers.values().all(|given| given.len() == 2 && given[0] != given[1]));
        }
        let both = questions(&captioned(FILE).unwrap(), 9, 0).unwrap();
        assert_eq!(both.len(), 2 * (2 + 2 + 1 + 1));
        assert!(both.iter().any(|question| question["image"] == "b.jpg" && question["id"] == "1-1-no"));
        let array = format!("[{}]", FILE.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().join(","));
        assert_eq!(questions(&captioned(&array).unwrap(), 9, 0).unwrap(), both);
    }

    #[test]
    fn a_pictures_own_caption_is_never_wrong() {
        let file = |captions: &[&str]| {
            let lines = captions
                .iter()
                .enumerate()
                .map(|(k, caption)| json!({"image": format!("{k}.jpg"), "caption": caption}));
            captioned(&lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap()
        };
        for seed in 0..5 {
            for question in questions(&file(&["a cat", "A cat.", "a dog"]), 1, seed).unwrap() {
                let asked = question["conversations"][0]["value"].as_str().unwrap();
                let is_cat = asked.to_lowercase().contains("a cat");
                let right = is_cat == (question["image"] != "2.jpg");
                assert_eq!(question["conversations"][1]["value"], if right { "yes" } else { "no" }, "{question}");
            }
        }
        let error = questions(&file(&["a cat", "a cat"]), 1, 0).unwrap_err().to_string();
        assert!(error.starts_with("all other pictures have captions of \"0.jpg\" too"), "{error}");
    }

    #[test]
    fn what_is_no_caption_is_told_by_its_place() {
        let error = |text: &str| {
            let found = captioned(text).and_then(|pictures| questions(&pictures, 1, 0));
            format!("{:#}", found.unwrap_err())
        };
        assert!(error("{\"image\": \"a.jpg\", \"caption\": \"A.\"}").contains("captions of 1 pictures"));
        assert_eq!(error("\n{\"caption\": \"A.\"}"), "record 1: it names no picture (`frames`, `images` or `image`)");
        assert!(error("{\"frames\": [\"a\", \"b\"], \"caption\": \"A.\"}").contains("names 2 pictures"));
        assert!(error("{\"image\": \"a.jpg\", \"captions\": [\" \"]}").contains("it has no caption"));
        assert!(
            error("{\"image\": \"a.jpg\", \"caption\": \"an <image>\"}")
                .contains("\"an <image>\" has a picture's place")
        );
        assert!(error("{}\nnot json").starts_with("line 2: "), "{}", error("{}\nnot json"));
    }
}
