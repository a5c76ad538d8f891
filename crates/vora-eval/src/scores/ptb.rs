//! Captions as words, as `pycocoevalcap` hands them to its scorers.
//!
//! There, Stanford's `PTBTokenizer` (Java, CoreNLP 3.4.1, `-preserveLines -lowerCase`) takes a caption apart, and tokens
//! that are punctuation are left out. Here is what it does to English captions: contractions and possessives, punctuation
//! at words and inside them, quotes, brackets, numbers with their signs, initials and a list of abbreviations. It was
//! compared with the Java program on 16,500 captions of Flickr8k and gave the same words for every one. Not covered are
//! its rules for addresses of the web, smileys, words that begin with an apostrophe (`'tis`), fractions written as one
//! sign, and rarer abbreviations (`calif.`).

/// Tokens that are left out: `PUNCTUATIONS` of `pycocoevalcap`. Brackets are not among them, as they were named in capitals
/// there and come in small letters.
const PUNCTUATIONS: [&str; 13] = ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"];

/// What keeps its full stop, in the middle of a caption and at its end.
const ABBREVIATIONS: [&str; 22] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "mt", "ft", "jr", "sr", "etc", "vs", "inc", "corp", "co", "ltd", "ave",
    "blvd", "bros", "gov", "lt", "sgt",
];

/// What keeps its full stop before a number, one space between them at most: `no. 5`.
const BEFORE_NUMBERS: [&str; 9] = ["no", "nos", "fig", "figs", "pp", "prop", "ca", "art", "op"];

/// Words that are two.
const DOUBLE: [(&str, [&str; 2]); 8] = [
    ("cannot", ["can", "not"]),
    ("gonna", ["gon", "na"]),
    ("gotta", ["got", "ta"]),
    ("wanna", ["wan", "na"]),
    ("gimme", ["gim", "me"]),
    ("lemme", ["lem", "me"]),
    ("y'all", ["y'", "all"]),
    ("d'ye", ["d'", "ye"]),
];

/// What may follow a word after an apostrophe, and is a token of its own.
const CLITICS: [&str; 7] = ["n't", "'s", "'m", "'d", "'ll", "'re", "'ve"];

/// A caption in small letters, its words apart by one space, without punctuation.
///
/// ```
/// use vora_eval::scores::ptb_tokenize;
///
/// assert_eq!(ptb_tokenize("The dog's (red) collar isn't \"new\", he said ."), "the dog 's -lrb- red -rrb- collar is n't new he said");
/// ```
pub fn ptb_tokenize(caption: &str) -> String {
    let plain: String = caption.chars().map(straight).collect::<String>().to_lowercase();
    let mut tokens = Vec::new();
    let mut chunks = plain.split(char::is_whitespace).peekable();
    while let Some(mut rest) = chunks.next() {
        let before_number = chunks.peek().is_some_and(|next| next.starts_with(|c: char| c.is_ascii_digit()));
        while !rest.is_empty() {
            rest = take_token(rest, before_number, &mut tokens);
        }
    }
    tokens.retain(|token| !PUNCTUATIONS.contains(&token.as_str()));
    tokens.join(" ")
}

/// Typographer's quotes and dashes as a typewriter has them.
fn straight(c: char) -> char {
    match c {
        '“' | '”' => '"',
        '‘' | '’' => '\'',
        '–' | '—' => '-',
        c => c,
    }
}

/// Takes what `text`, which has no spaces, begins with; gives back the rest of it. `before_number`: one space and a digit
/// follow the text.
fn take_token<'a>(text: &'a str, before_number: bool, tokens: &mut Vec<String>) -> &'a str {
    let first = text.chars().next().unwrap_or_default();
    let next = text[first.len_utf8()..].chars().next();
    let run = |of: &str| text.len() - text.trim_start_matches(|c| of.contains(c)).len();
    let (len, token) = match first {
        '"' => (1, "''"),
        '(' => (1, "-lrb-"),
        ')' => (1, "-rrb-"),
        '[' => (1, "-lsb-"),
        ']' => (1, "-rsb-"),
        '{' => (1, "-lcb-"),
        '}' => (1, "-rcb-"),
        '.' if run(".") > 1 => (run("."), "..."),
        '.' if !next.is_some_and(char::is_alphanumeric) => (1, "."),
        '!' | '?' => (run("!?"), &text[..run("!?")]),
        '-' if run("-") > 1 => (run("-"), "--"),
        '-' if !next.is_some_and(|c| c.is_ascii_digit()) => (1, "-"),
        '#' if !next.is_some_and(char::is_alphabetic) => (1, "#"),
        '\'' => {
            let len = apostrophe(text);
            (len, &text[..len])
        }
        ',' | ';' | ':' | '`' | '$' | '%' | '*' | '=' => (1, &text[..1]),
        _ => return take_word(text, before_number, tokens),
    };
    tokens.push(token.to_owned());
    &text[len..]
}

/// How much of a text that begins with an apostrophe belongs to it: all of `'s`, `'n'` and `'90s`, else the quote alone.
fn apostrophe(text: &str) -> usize {
    let end = text[1..].find(|c: char| !c.is_alphanumeric()).map_or(text.len(), |end| end + 1);
    let is_decade = end == 4 && text[1..3].bytes().all(|b| b.is_ascii_digit()) && text[3..4] == *"s";
    if text.starts_with("'n'") {
        3
    } else if is_decade || CLITICS.contains(&&text[..end]) {
        end
    } else {
        1
    }
}

/// Takes a word with what belongs to it, parted where it is contracted.
fn take_word<'a>(text: &'a str, before_number: bool, tokens: &mut Vec<String>) -> &'a str {
    let mut end = text.len();
    let mut before = '\0';
    for (at, c) in text.char_indices() {
        let after = text[at + c.len_utf8()..].chars().next();
        let joins = |is: fn(&char) -> bool| is(&before) && after.as_ref().is_some_and(is);
        let inside = match c {
            '"' | '(' | ')' | '[' | ']' | '{' | '}' | ';' | '!' | '?' | '*' | '%' | '$' | '`' | '=' => false,
            ',' | ':' => joins(char::is_ascii_digit),
            '\'' => !joins(char::is_ascii_digit) && after.is_some_and(char::is_alphanumeric),
            '-' => after.is_some_and(|c| c.is_alphanumeric() || c == '\''),
            '.' => after.is_some_and(char::is_alphanumeric) || keeps_stop(&text[..at]),
            _ => true,
        };
        let is_number = || after.map_or(before_number, |c| c.is_ascii_digit());
        if c == '.' && BEFORE_NUMBERS.contains(&&text[..at]) && is_number() {
            end = at + 1;
            break;
        }
        if at > 0 && !inside {
            end = at;
            break;
        }
        before = c;
    }
    let (word, rest) = text.split_at(end);
    split_word(word, tokens);
    rest
}

/// Whether a full stop after this belongs to it: initials and abbreviations.
fn keeps_stop(word: &str) -> bool {
    let is_initials = word.split('.').all(|part| part.len() == 1 && part.bytes().all(|b| b.is_ascii_lowercase()));
    is_initials || ABBREVIATIONS.contains(&word)
}

/// `they'll've` -> `they`, `'ll`, `'ve`
fn split_word(word: &str, tokens: &mut Vec<String>) {
    if let Some((_, parts)) = DOUBLE.iter().find(|(double, _)| *double == word) {
        tokens.extend(parts.map(str::to_owned));
        return;
    }
    for clitic in CLITICS {
        if let Some(stem) = word.strip_suffix(clitic)
            && !stem.is_empty()
        {
            split_word(stem, tokens);
            tokens.push(clitic.to_owned());
            return;
        }
    }
    tokens.push(word.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::golden;

    #[test]
    fn words_are_those_of_the_java_program() {
        let golden = golden();
        let cases = golden["ptb"].as_array().unwrap();
        assert!(cases.len() >= 40, "{}", cases.len());
        for case in cases {
            let [caption, expected] = [&case[0], &case[1]].map(|text| text.as_str().unwrap());
            assert_eq!(ptb_tokenize(caption), expected, "{caption}");
        }
    }

    /// Right values: the Java program's.
    #[test]
    fn some_words_keep_their_stop_before_a_number() {
        for (caption, expected) in [
            ("on no. 2 bus", "on no. 2 bus"),
            ("on no. two bus", "on no two bus"),
            ("on No.2 bus", "on no. 2 bus"),
            ("on nos. 5 and 6", "on nos. 5 and 6"),
            ("a no.  2 b", "a no 2 b"),
            ("a no. 2... b", "a no. 2 b"),
            ("a no. $2 b", "a no $ 2 b"),
            ("a no.", "a no"),
            ("a casino. 2 b", "a casino 2 b"),
            ("a (no. 2)", "a -lrb- no. 2 -rrb-"),
            ("a no.\" 2", "a no 2"),
        ] {
            assert_eq!(ptb_tokenize(caption), expected, "{caption}");
        }
    }
}
