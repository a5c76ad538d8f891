//! What is asked about a scene, and what is right.

use super::dataset::Scenes;
use super::description::Description;
use super::draw::{Draw, Purpose};
use super::question_kind::QuestionKind;
use super::scene::{Object, Scene};
use super::split::Split;

/// A question with its only right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What it is about.
    pub kind: QuestionKind,
    /// The question.
    pub question: String,
    /// The answer, one or two words but for captions and descriptions.
    pub answer: String,
}

/// How a description is asked for.
const DESCRIBE: [&str; 10] = [
    "Describe this image.",
    "Describe the image in one sentence.",
    "Describe the picture in a sentence.",
    "Describe what you see.",
    "What is in the picture?",
    "What is in this image?",
    "What does the picture show?",
    "What can you see in this picture?",
    "What do you see?",
    "Tell me what is in the image.",
];

/// Questions about one scene to choose from, with their weights.
struct Candidates<'a> {
    scenes: &'a Scenes,
    scene: &'a Scene,
    index: u64,
    asks_shape_of_named: bool,
    found: Vec<(f64, Question)>,
}

impl Scenes {
    /// `questions_per_image` questions about the scene of this number, or as many as there are, in random order:
    /// each question type in proportion to its weight in the config, no question twice.
    pub fn questions(&self, index: u64) -> Vec<Question> {
        let draw = &mut Draw::new(self.config.seed, self.split.stream(), index, Purpose::Questions);
        let scene = self.scene(index);
        let asks_shape_of_named = self.split != Split::Train || index >= self.config.shape_of_named_after;
        let mut candidates = Candidates { scenes: self, scene: &scene, index, asks_shape_of_named, found: Vec::new() };
        candidates.all(draw);
        let mut left = candidates.found;
        let mut chosen = Vec::with_capacity(self.config.questions_per_image);
        while chosen.len() < self.config.questions_per_image && !left.is_empty() {
            let idx = draw.weighted(left.iter().map(|candidate| candidate.0));
            chosen.push(left.remove(idx).1);
        }
        chosen
    }
}

impl Candidates<'_> {
    /// Everything that can be asked. In the split `unseen` the object that training never showed is the only one
    /// that questions are about.
    fn all(&mut self, draw: &mut Draw) {
        let objects = &self.scene.objects;
        let asked = if self.scenes.split == Split::Unseen { &objects[..1] } else { &objects[..] };
        for object in asked {
            self.about(object, 1.0 / asked.len() as f64, draw);
        }
        self.push(1.0, QuestionKind::HowMany, "How many?", ["one", "two", "three"][objects.len() - 1]);
        self.is_colour(asked, draw);
        self.is_shape(asked, draw);
        self.push(1.0, QuestionKind::Caption, "Describe the picture.", &whole_scene(self.scene, QuestionKind::Caption));
        self.describe();
        for object in asked {
            self.box_of(object, 1.0 / asked.len() as f64);
        }
    }

    fn push(&mut self, share: f64, kind: QuestionKind, question: impl Into<String>, answer: &str) {
        let weight = share * self.scenes.config.weight(kind, self.scene.objects.len());
        if weight > 0.0 {
            self.found.push((weight, Question { kind, question: question.into(), answer: answer.to_owned() }));
        }
    }

    fn lone(&self) -> bool {
        self.scene.objects.len() == 1
    }

    /// Colour, shape and place of one object. Among several it is referred to by what is not asked.
    fn about(&mut self, object: &Object, share: f64, draw: &mut Draw) {
        let named = !self.lone() || draw.chance(self.scenes.config.named_share);
        let by_colour = draw.chance(0.5);
        let shape = object.shape.name();
        if let Some(colour) = object.colour {
            let question = if named { format!("What color is the {shape}?") } else { "What color?".to_owned() };
            self.push(share, QuestionKind::Colour, question, colour.name());
        }
        match object.colour {
            Some(_) if !self.asks_shape_of_named => {}
            Some(colour) if named => {
                self.push(share, QuestionKind::Shape, format!("Which shape is {}?", colour.name()), shape);
            }
            None if !self.lone() => {} // nothing to call it by
            _ => self.push(share, QuestionKind::Shape, "What shape?", shape),
        }
        let question = match object.colour {
            _ if !named => "Where is it?".to_owned(),
            Some(colour) if by_colour => format!("Where is the {} one?", colour.name()),
            _ => format!("Where is the {shape}?"),
        };
        self.push(share, QuestionKind::Where, question, object.quarter.name());
    }

    /// The whole scene in a sentence. How it is asked for is drawn apart, so that the other questions stay what they are.
    fn describe(&mut self) {
        if self.asks_shape_of_named || self.scene.objects.iter().all(|object| object.colour.is_none()) {
            let scenes = self.scenes;
            let draw = &mut Draw::new(scenes.config.seed, scenes.split.stream(), self.index, Purpose::Wording);
            let answer = whole_scene(self.scene, QuestionKind::Describe);
            self.push(1.0, QuestionKind::Describe, draw.pick(&DESCRIBE), &answer);
        }
    }

    /// The box around one object, which is called by its colour or its shape among several. How it is asked for is drawn apart,
    /// so that the other questions stay what they are.
    fn box_of(&mut self, object: &Object, share: f64) {
        let scenes = self.scenes;
        let stream = self.index.wrapping_mul(4).wrapping_add(object.quarter as u64);
        let draw = &mut Draw::new(scenes.config.seed, scenes.split.stream(), stream, Purpose::Box);
        let by_colour = draw.chance(0.5);
        let question = match object.colour {
            _ if self.lone() && !draw.chance(scenes.config.named_share) => "Give its box.".to_owned(),
            Some(colour) if by_colour => format!("Give the box of the {} one.", colour.name()),
            _ => format!("Give the box of the {}.", object.shape.name()),
        };
        self.push(share, QuestionKind::Box, question, &self.scene.bounding_box(object).to_string());
    }

    /// Whether something has a colour, once with yes and once with no. Where an object's colour has no name it is not
    /// asked, for nobody can deny that such an object is, say, red.
    fn is_colour(&mut self, asked: &[Object], draw: &mut Draw) {
        let present: Vec<_> = self.scene.objects.iter().filter_map(|object| object.colour).collect();
        if present.len() == self.scene.objects.len() {
            let subject = if self.lone() { "it" } else { "anything" };
            for (colour, answer) in yes_and_no(&present[..asked.len()], &present, self.scenes.colours(), draw) {
                self.push(0.25, QuestionKind::YesNo, format!("Is {subject} {}?", colour.name()), answer);
            }
        }
    }

    /// Whether something has a shape, once with yes and once with no.
    fn is_shape(&mut self, asked: &[Object], draw: &mut Draw) {
        if !self.asks_shape_of_named && asked.iter().any(|object| object.colour.is_some()) {
            return;
        }
        let present: Vec<_> = self.scene.objects.iter().map(|object| object.shape).collect();
        let subject = if self.lone() { "it" } else { "there" };
        for (shape, answer) in yes_and_no(&present[..asked.len()], &present, self.scenes.shapes(), draw) {
            self.push(0.25, QuestionKind::YesNo, format!("Is {subject} a {}?", shape.name()), answer);
        }
    }
}

/// One of `asked`, and one of `all` that is not `present`: only the picture tells the two questions apart.
fn yes_and_no<T: Copy + PartialEq>(asked: &[T], present: &[T], all: &[T], draw: &mut Draw) -> [(T, &'static str); 2] {
    let absent: Vec<_> = all.iter().copied().filter(|item| !present.contains(item)).collect();
    [(draw.pick(asked), "yes"), (draw.pick(&absent), "no")]
}

/// All of a scene, in keywords or, where it is to be described, in a sentence.
pub(super) fn whole_scene(scene: &Scene, kind: QuestionKind) -> String {
    if kind == QuestionKind::Describe { Description::of(scene).to_string() } else { caption(scene) }
}

/// Objects from top left to bottom right: "red circle top left, ring bottom right".
fn caption(scene: &Scene) -> String {
    let mut objects: Vec<_> = scene.objects.iter().collect();
    objects.sort_by_key(|object| object.quarter);
    let phrase = |object: &&Object| {
        let colour = object.colour.map(|colour| format!("{} ", colour.name())).unwrap_or_default();
        format!("{colour}{} {}", object.shape.name(), object.quarter.name())
    };
    objects.iter().map(phrase).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::super::ScenesConfig;
    use super::*;

    fn scenes(split: Split) -> Scenes {
        let config = ScenesConfig {
            questions_per_image: 20,
            named_share: 0.3,
            lone_first: 0,
            kinds: QuestionKind::ALL.map(|kind| (kind, 1.0)).into(),
            kinds_of_several: None,
            ..ScenesConfig::default()
        };
        Scenes::new(config, split).unwrap()
    }

    #[test]
    fn answers_are_true() {
        for split in [Split::Train, Split::Unseen] {
            let scenes = scenes(split);
            for index in 0..1000 {
                let objects = scenes.scene(index).objects;
                for Question { kind, question, answer } in scenes.questions(index) {
                    // What the question names must single out one object; a lone object needs no name.
                    let meant: Vec<_> = objects
                        .iter()
                        .filter(|o| {
                            objects.len() == 1
                                || question.contains(o.shape.name())
                                || o.colour.is_some_and(|c| question.contains(&format!(" {}", c.name())))
                        })
                        .collect();
                    match kind {
                        QuestionKind::Colour => assert_eq!(meant[0].colour.unwrap().name(), answer),
                        QuestionKind::Shape => assert_eq!(meant[0].shape.name(), answer),
                        QuestionKind::Where => assert_eq!(meant[0].quarter.name(), answer),
                        QuestionKind::HowMany => assert_eq!(["one", "two", "three"][objects.len() - 1], answer),
                        QuestionKind::YesNo => {
                            let named = |o: &Object| {
                                question.contains(o.shape.name())
                                    || o.colour.is_some_and(|c| question.contains(c.name()))
                            };
                            assert_eq!(objects.iter().any(named), answer == "yes", "{question}");
                        }
                        QuestionKind::Caption => assert_eq!(answer.split(", ").count(), objects.len()),
                        QuestionKind::Box => {
                            assert_eq!(scenes.scene(index).bounding_box(meant[0]).to_string(), answer);
                        }
                        QuestionKind::Describe => {
                            let truth = Description::of(&scenes.scene(index));
                            assert_eq!(Description::parse(&answer), Some(truth));
                        }
                    }
                    if matches!(
                        kind,
                        QuestionKind::Colour | QuestionKind::Shape | QuestionKind::Where | QuestionKind::Box
                    ) {
                        assert_eq!(meant.len(), 1, "`{question}` in scene {index}");
                        assert!(!question.contains(&answer), "`{question}` holds its answer");
                    }
                }
            }
        }
    }

    #[test]
    fn training_text_never_joins_a_held_out_pair() {
        let scenes = scenes(Split::Train);
        for index in 0..2000 {
            for Question { question, answer, .. } in scenes.questions(index) {
                for (colour, shape) in &scenes.held_out {
                    assert!(!format!("{question} {answer}").contains(&format!("{} {}", colour.name(), shape.name())));
                }
            }
        }
    }

    #[test]
    fn unseen_asks_about_the_held_out_object_only() {
        let scenes = scenes(Split::Unseen);
        for index in 0..500 {
            let objects = scenes.scene(index).objects;
            for Question { kind, question, answer } in scenes.questions(index) {
                for other in &objects[1..] {
                    let names = |text: &str| text.contains(other.shape.name());
                    assert!(
                        matches!(kind, QuestionKind::Caption | QuestionKind::Describe)
                            || !names(&question) && !names(&answer),
                        "{question} {answer}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_question_is_asked_once_and_yes_is_right_half_of_the_time() {
        let scenes = scenes(Split::Train);
        let mut yes = [0.0; 2];
        for index in 0..2000 {
            let questions = scenes.questions(index);
            assert_eq!(questions.iter().map(|q| &q.question).collect::<HashSet<_>>().len(), questions.len());
            for question in questions.iter().filter(|q| q.kind == QuestionKind::YesNo) {
                yes[usize::from(question.answer == "yes")] += 1.0;
            }
        }
        assert!((yes[1] / (yes[0] + yes[1]) - 0.5_f64).abs() < 0.03, "{yes:?}");
    }

    #[test]
    fn kinds_come_in_proportion_to_their_weights() {
        let kinds = BTreeMap::from([(QuestionKind::Where, 1.0), (QuestionKind::HowMany, 3.0)]);
        let config = ScenesConfig { questions_per_image: 1, kinds, kinds_of_several: None, ..ScenesConfig::default() };
        let scenes = Scenes::new(config, Split::Train).unwrap();
        let asked: Vec<_> = (0..2000).flat_map(|index| scenes.questions(index)).map(|q| q.kind).collect();
        let how_many = asked.iter().filter(|kind| **kind == QuestionKind::HowMany).count();
        assert!(asked.len() == 2000 && (1430..1570).contains(&how_many), "{how_many}");
    }

    #[test]
    fn at_first_only_objects_without_a_named_colour_are_asked_their_shape() {
        let config = ScenesConfig {
            shape_of_named_after: 300,
            questions_per_image: 20,
            kinds: QuestionKind::ALL
                .iter()
                .filter(|kind| **kind != QuestionKind::Caption)
                .map(|kind| (*kind, 1.0))
                .collect(),
            kinds_of_several: None,
            ..ScenesConfig::default()
        };
        let asks_shape = |split, index| {
            let scenes = Scenes::new(config.clone(), split).unwrap();
            let named = scenes.scene(index).objects.iter().any(|object| object.colour.is_some());
            let is_shape = |q: &Question| {
                matches!(q.kind, QuestionKind::Shape | QuestionKind::Describe)
                    || q.kind == QuestionKind::YesNo && scenes.shapes().iter().any(|s| q.question.contains(s.name()))
            };
            named && scenes.questions(index).iter().any(is_shape)
        };
        let count = |split, from: u64| (from..from + 300).filter(|index| asks_shape(split, *index)).count();
        assert_eq!(count(Split::Train, 0), 0);
        assert!(count(Split::Train, 300) > 100 && count(Split::Test, 0) > 100);
    }

    #[test]
    fn descriptions_and_boxes_change_no_other_question() {
        let kinds = [QuestionKind::ALL.map(|kind| (kind, 1.0)).into(), BTreeMap::from([(QuestionKind::Describe, 1.0)])];
        let [all, describe] = kinds.map(|kinds| {
            let config =
                ScenesConfig { questions_per_image: 20, kinds, kinds_of_several: None, ..ScenesConfig::default() };
            Scenes::new(config, Split::Unseen).unwrap()
        });
        let without = ScenesConfig {
            kinds: QuestionKind::ALL
                .into_iter()
                .filter(|kind| *kind != QuestionKind::Describe)
                .map(|kind| (kind, 1.0))
                .collect(),
            ..all.config().clone()
        };
        let without = Scenes::new(without, Split::Unseen).unwrap();
        let mut wordings = HashSet::new();
        let set =
            |questions: Vec<Question>| questions.into_iter().map(|q| (q.question, q.answer)).collect::<HashSet<_>>();
        for index in 0..200 {
            let asked = describe.questions(index);
            assert_eq!(
                set(asked.clone()).union(&set(without.questions(index))).cloned().collect::<HashSet<_>>(),
                set(all.questions(index))
            );
            let [Question { question, answer, .. }] = &asked[..] else { panic!("{asked:?}") };
            let (colour, shape) =
                (describe.scene(index).objects[0].colour.unwrap(), describe.scene(index).objects[0].shape);
            assert!(answer.contains(&format!("{} {}", colour.name(), shape.name())), "{answer}");
            wordings.insert(question.clone());
        }
        assert_eq!(wordings, DESCRIBE.map(str::to_owned).into());
    }

    #[test]
    fn several_objects_may_be_asked_other_kinds() {
        let kinds_of_several = Some(BTreeMap::from([(QuestionKind::HowMany, 1.0)]));
        let scenes = Scenes::new(ScenesConfig { kinds_of_several, ..ScenesConfig::default() }, Split::Test).unwrap();
        for index in 0..200 {
            let questions = scenes.questions(index);
            let only_number = questions.iter().all(|question| question.kind == QuestionKind::HowMany);
            assert_eq!(only_number, scenes.scene(index).objects.len() > 1);
        }
    }

    #[test]
    fn questions_do_not_depend_on_how_many_are_asked() {
        let few = Scenes::new(ScenesConfig { questions_per_image: 2, ..ScenesConfig::default() }, Split::Test).unwrap();
        let many = Scenes::new(ScenesConfig::default(), Split::Test).unwrap();
        for index in 0..50 {
            assert_eq!(few.questions(index), many.questions(index)[..2]);
        }
    }
}
