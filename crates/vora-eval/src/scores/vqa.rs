//! VQA accuracy (Antol et al. 2015), as the official `VQAEval` and `lmms-eval`'s VQAv2 compute it.

/// Articles, which are left out.
const ARTICLES: [&str; 3] = ["a", "an", "the"];

/// Numbers that are written in digits.
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Words that are recognised with one of their apostrophes missing.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't \
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't \
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've \
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's \
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't \
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're \
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've";

/// Signs that are left out, or become a space.
const PUNCTUATIONS: &str = ";/[]\"{}()=+\\_->`<@,?!";

/// How many full stops are left out at most; more only by its regular expression's flag, which stands where a count goes.
const MAX_STOPS: usize = 32;

/// Between 0 and 1: over every way to leave one of the references out, the mean of `min(matches / 3, 1)`, answer and
/// references [normalised](normalize_answer).
///
/// With two to nine references the same formula holds, as it does in both; then even a perfect answer may have less than
/// 1. With a single one it would give 0 to any answer, so there it is 1 for a match and 0 else.
pub fn vqa_accuracy(answer: &str, references: &[String]) -> f64 {
    let answer = normalize_answer(answer);
    let matches: Vec<bool> = references.iter().map(|reference| normalize_answer(reference) == answer).collect();
    let matching = matches.iter().filter(|&&is_match| is_match).count();
    match references.len() {
        0 => 0.0,
        1 => matching as f64,
        n => {
            let others = matches.iter().map(|&is_match| matching - usize::from(is_match));
            others.map(|others| (others as f64 / 3.0).min(1.0)).sum::<f64>() / n as f64
        }
    }
}

/// An answer in small letters without punctuation and articles, numbers up to ten in digits, contractions with their
/// apostrophes.
pub fn normalize_answer(answer: &str) -> String {
    let answer = answer.replace(['\n', '\t'], " ");
    let answer = without_punctuation(answer.trim()).to_lowercase();
    let words = answer.split_whitespace().map(|word| {
        let number = NUMBERS.iter().find(|(name, _)| *name == word);
        number.map_or(word, |(_, digits)| digits)
    });
    let words: Vec<&str> = words.filter(|word| !ARTICLES.contains(word)).map(contraction).collect();
    words.join(" ")
}

/// The contraction of which `word` is a form without one apostrophe, else the word.
fn contraction(word: &str) -> &str {
    let lacks_one = |whole: &&str| {
        whole.match_indices('\'').any(|(at, _)| word.strip_prefix(&whole[..at]) == Some(&whole[at + 1..]))
    };
    match word {
        "somebody'd" => "somebodyd", // the table has it the wrong way round
        word => CONTRACTIONS.split_whitespace().find(lacks_one).unwrap_or(word),
    }
}

/// A sign beside a space is left out, and so is every sign of a text with a comma inside a number; others become a space.
/// Full stops are left out where no digit follows.
fn without_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let comma_in_number = (1..chars.len()).any(|start| {
        let after = chars[start..].iter().find(|&&c| c != ',');
        chars[start] == ',' && chars[start - 1].is_ascii_digit() && after.is_some_and(char::is_ascii_digit)
    });
    let mut plain = text.to_owned();
    for sign in PUNCTUATIONS.chars() {
        let at_space = text.contains(&format!("{sign} ")) || text.contains(&format!(" {sign}"));
        plain = plain.replace(sign, if at_space || comma_in_number { "" } else { " " });
    }
    let mut stops = 0;
    let mut kept = String::with_capacity(plain.len());
    let mut chars = plain.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '.' && stops < MAX_STOPS && !chars.peek().is_some_and(char::is_ascii_digit) {
            stops += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::{assert_near, golden};

    #[test]
    fn answers_are_normalised_as_in_lmms_eval() {
        let golden = golden();
        let cases = golden["vqa"]["normalized"].as_array().unwrap();
        assert!(cases.len() > 100, "every contraction is among them");
        for case in cases {
            let [answer, expected] = [&case[0], &case[1]].map(|text| text.as_str().unwrap());
            assert_eq!(normalize_answer(answer), expected, "{answer}");
        }
    }

    #[test]
    fn accuracy_is_that_of_lmms_eval() {
        let golden = golden();
        for case in golden["vqa"]["accuracy"].as_array().unwrap() {
            let references: Vec<String> = serde_json::from_value(case["answers"].clone()).unwrap();
            assert_near(vqa_accuracy(case["answer"].as_str().unwrap(), &references), &case["accuracy"]);
        }
    }

    #[test]
    fn a_single_reference_is_matched() {
        let reference = ["The two dogs".to_owned()];
        assert_eq!((vqa_accuracy("2 dogs.", &reference), vqa_accuracy("dogs", &reference)), (1.0, 0.0));
        assert_eq!(vqa_accuracy("2", &[]), 0.0);
    }
}
