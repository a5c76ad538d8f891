//! What a model is asked: conversations of a file, or scenes, each question with the answers that are expected.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Conversations, Record, RecordKeys};
use vora_llm::{Message, Part};
use vora_vision::RgbImage;

use super::Task;

/// How many scenes are asked about unless `--limit` says.
const SCENES: u64 = 100;

/// A question, and what is known of it.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) id: String,
    /// What it is about, where the data say.
    pub(super) kind: Option<String>,
    /// What was said up to it.
    pub(super) messages: Vec<Message>,
    /// The pictures by their names in the data.
    pub(super) pictures: Vec<String>,
    /// The answers that are expected.
    pub(super) references: Vec<String>,
    captions: Vec<String>,
    has_question_key: bool,
}

impl Question {
    /// The question itself.
    pub(super) fn text(&self) -> String {
        self.messages.last().map_or(String::new(), |message| text_of(message).trim().to_owned())
    }
}

/// Questions, and where their pictures are.
#[derive(Debug)]
pub(super) struct QuestionSet {
    pub(super) questions: Vec<Question>,
    /// What could not be read: where it is and why.
    pub(super) left_out: Vec<String>,
    pictures: Pictures,
}

#[derive(Debug)]
enum Pictures {
    Files(Conversations),
    Scenes(Scenes),
}

/// The keys of a record beside those of a conversation.
#[derive(Debug, Default, Deserialize)]
struct Extra {
    question: Option<String>,
    answer: Option<String>,
    #[serde(default)]
    answers: Vec<Answer>,
    #[serde(default)]
    captions: Vec<String>,
    kind: Option<String>,
}

/// One of several answers, as a string or as VQA has it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    Text(String),
    Given { answer: String },
}

impl QuestionSet {
    /// Reads up to `limit` records of `data`: a file of JSON lines, its pictures under `images` or beside it, or
    /// `scenes:test` and `scenes:unseen`.
    pub(super) fn open(data: &str, images: Option<&Path>, limit: Option<u64>) -> Result<Self> {
        match data.strip_prefix("scenes:") {
            Some(split) => Self::scenes(split, limit.unwrap_or(SCENES)),
            None => Self::file(Path::new(data), images, limit),
        }
    }

    fn scenes(split: &str, limit: u64) -> Result<Self> {
        let split = match split {
            "test" => Split::Test,
            "unseen" => Split::Unseen,
            other => bail!("`scenes:{other}` is nothing to be asked about, it takes scenes:test or scenes:unseen"),
        };
        let scenes = Scenes::new(ScenesConfig::default(), split)?;
        let mut questions = Vec::new();
        for index in 0..limit {
            for question in scenes.questions(index) {
                questions.push(Question {
                    id: format!("{split}-{index}"),
                    kind: Some(question.kind.name().to_owned()),
                    messages: vec![Message::question_about(1, &question.question)],
                    pictures: vec![index.to_string()],
                    references: vec![question.answer],
                    captions: Vec::new(),
                    has_question_key: false,
                });
            }
        }
        Ok(Self { questions, left_out: Vec::new(), pictures: Pictures::Scenes(scenes) })
    }

    fn file(path: &Path, images: Option<&Path>, limit: Option<u64>) -> Result<Self> {
        let beside =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Path::to_owned);
        let records = Conversations::open(path, images.unwrap_or(&beside))?;
        let (mut questions, mut left_out) = (Vec::new(), Vec::new());
        for index in 0..records.len().min(limit.unwrap_or(u64::MAX)) {
            let line = records.line(index);
            match line.and_then(|line| read(&line, &records.place(index))) {
                Ok(read) => questions.extend(read),
                Err(error) => left_out.push(format!("{}: {error:#}", records.place(index))),
            }
        }
        ensure!(
            !questions.is_empty(),
            "no record of {} can be asked about; the first: {}",
            path.display(),
            left_out.first().map_or("none was read", String::as_str)
        );
        Ok(Self { questions, left_out, pictures: Pictures::Files(records) })
    }

    /// The task that the data are made for.
    ///
    /// Captions where a record has `captions` or two ask the same of the same pictures, yes/no where no other answer is
    /// expected, VQA where records have `question`, else exact match.
    pub(super) fn task(&self) -> Task {
        let is_yes_no = |text: &String| ["yes", "no"].contains(&text.trim().to_lowercase().as_str());
        let asked: HashSet<_> = self.questions.iter().map(|question| (&question.pictures, question.text())).collect();
        let is_file = matches!(self.pictures, Pictures::Files(_));
        if is_file && (asked.len() < self.questions.len() || self.questions.iter().any(|q| !q.captions.is_empty())) {
            Task::Caption
        } else if self.questions.iter().all(|question| question.references.iter().all(is_yes_no)) {
            Task::Yesno
        } else if self.questions.iter().any(|question| question.has_question_key) {
            Task::Vqa
        } else {
            Task::Exact
        }
    }

    /// Makes one question of all that are about the same pictures, the captions of any of them its references.
    pub(super) fn gather_captions(&mut self) {
        let mut gathered: Vec<Question> = Vec::new();
        let mut places: BTreeMap<Vec<String>, usize> = BTreeMap::new();
        for mut question in std::mem::take(&mut self.questions) {
            let captions = std::mem::take(&mut question.captions);
            if !captions.is_empty() {
                question.references = captions;
            }
            match places.get(&question.pictures) {
                // Each record of a picture may have all of its captions.
                Some(&place) if gathered[place].references == question.references => {}
                Some(&place) => gathered[place].references.append(&mut question.references),
                None => {
                    places.insert(question.pictures.clone(), gathered.len());
                    gathered.push(question);
                }
            }
        }
        self.questions = gathered;
    }

    /// For each question the pictures of another one, as many and none the same; none where there are no others.
    ///
    /// Different lists of pictures change places in the order in which they come, halfway round, so each is seen as
    /// another's once.
    pub(super) fn other_pictures(&self) -> Vec<Option<Vec<String>>> {
        let mut seen = HashSet::new();
        let mut lists: BTreeMap<usize, Vec<&Vec<String>>> = BTreeMap::new(); // by their lengths
        for list in self.questions.iter().map(|question| &question.pictures) {
            if !list.is_empty() && seen.insert(list) {
                lists.entry(list.len()).or_default().push(list);
            }
        }
        let mut other = BTreeMap::new();
        for lists in lists.values() {
            let half = lists.len() / 2;
            for (place, list) in lists.iter().enumerate().filter(|_| half > 0) {
                other.insert(*list, lists[(place + half) % lists.len()].clone());
            }
        }
        self.questions.iter().map(|question| other.get(&question.pictures).cloned()).collect()
    }

    /// Decodes pictures by their names in the data.
    pub(super) fn decode(&self, pictures: &[String]) -> Result<Vec<RgbImage>> {
        let decode = |name: &String| match &self.pictures {
            Pictures::Files(records) => {
                vora_vision::decode_image(&records.image(name)?).with_context(|| format!("image `{name}`"))
            }
            Pictures::Scenes(scenes) => Ok(scenes.render(name.parse()?)),
        };
        pictures.iter().map(decode).collect()
    }
}

/// The questions of one record.
fn read(line: &[u8], place: &str) -> Result<Vec<Question>> {
    let (record, extra) = record(line)?;
    let id = if record.id.is_empty() { place.to_owned() } else { record.id };
    let has_question_key = extra.question.is_some();
    let given: Vec<String> = extra
        .answers
        .into_iter()
        .map(|answer| match answer {
            Answer::Text(answer) | Answer::Given { answer } => answer,
        })
        .collect();
    let mut questions = Vec::new();
    let mut said: Vec<Message> = Vec::new();
    for message in record.messages {
        if message.role == "assistant" {
            let places = said.iter().flat_map(|m| &m.content).filter(|part| **part == Part::Image).count();
            questions.push(Question {
                id: id.clone(),
                kind: extra.kind.clone(),
                messages: said.clone(),
                pictures: record.frames[..places].to_vec(),
                references: vec![text_of(&message)],
                captions: extra.captions.clone(),
                has_question_key,
            });
        }
        said.push(message);
    }
    if let [only] = questions.as_mut_slice()
        && !given.is_empty()
    {
        only.references = given;
    }
    Ok(questions)
}

/// The words of a message without pictures.
fn text_of(message: &Message) -> String {
    let text = message.content.iter().filter_map(|part| match part {
        Part::Text(text) => Some(text.as_str()),
        Part::Image => None,
    });
    text.collect()
}

/// A record, and what it says besides; one without a conversation has one made of `question` and `answer`.
fn record(line: &[u8]) -> Result<(Record, Extra)> {
    let keys = RecordKeys::default();
    let parsed = serde_json::from_slice::<Value>(line);
    let (Ok(Value::Object(mut object)), true) = (parsed, std::str::from_utf8(line).is_ok()) else {
        return Ok((Record::parse(line, &keys)?, Extra::default())); // which says what is wrong
    };
    let extra: Extra =
        serde_json::from_value(Value::Object(object.clone())).context("one of its keys is not as expected")?;
    if let (Some(question), false) = (&extra.question, object.contains_key(&keys.conversations)) {
        let first = extra.answers.first().map(|answer| match answer {
            Answer::Text(answer) | Answer::Given { answer } => answer,
        });
        let answer = extra.answer.as_ref().or(first).context("its `question` has neither `answer` nor `answers`")?;
        let turns = json!([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]);
        object.insert(keys.conversations.clone(), turns);
    }
    Ok((Record::parse(&serde_json::to_vec(&object)?, &keys)?, extra))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(lines: &str) -> QuestionSet {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        QuestionSet::open(&path.to_string_lossy(), None, None).unwrap()
    }

    #[test]
    fn the_blind_control_is_a_derangement() {
        let line = |frames: &str| format!(r#"{{"frames": {frames}, "question": "What?", "answer": "red"}}"#);
        let frames = [r#"["a"]"#, r#"["b"]"#, r#"["a"]"#, r#"["c"]"#, r#"["a", "b"]"#, "[]"];
        let set = set(&frames.map(line).join("\n"));
        let others: Vec<_> = set.other_pictures().into_iter().map(|other| other.map(|list| list.concat())).collect();
        let expected = [Some("b"), Some("c"), Some("b"), Some("a"), None, None];
        assert_eq!(others, expected.map(|other| other.map(str::to_owned)));
    }

    #[test]
    fn the_data_say_what_the_task_is() {
        let turns = |answer: &str, extra: &str| {
            let turns = r#""conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "#;
            format!(r#"{{"image": "a", {turns}"{answer}"}}]{extra}}}"#)
        };
        assert_eq!(set(&turns("red", "")).task(), Task::Exact);
        assert_eq!(set(&turns("Yes", "")).task(), Task::Yesno);
        assert_eq!(set(&turns("red", r#", "question": "What?""#)).task(), Task::Vqa);
        assert_eq!(set(&turns("red", r#", "captions": ["a", "b"]"#)).task(), Task::Caption);
        assert_eq!(set(&[turns("red", ""), turns("a ring", "")].join("\n")).task(), Task::Caption);
        assert_eq!(QuestionSet::open("scenes:test", None, Some(3)).unwrap().task(), Task::Exact);
    }
}
