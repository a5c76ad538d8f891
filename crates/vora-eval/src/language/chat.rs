//! What a chat model is asked to see whether it still chats; none of these begins a text of an anchor's.

/// Questions without a picture.
pub(super) const QUESTIONS: [&str; 20] = [
    "What is the boiling point of water?",
    "Can you recommend a good book?",
    "Explain the water cycle to a child.",
    "What is the difference between weather and climate?",
    "Write a haiku about autumn leaves.",
    "How many continents are there?",
    "How do I clean a wooden table?",
    "Who painted the Mona Lisa?",
    "Write a short thank-you note to a teacher.",
    "What is a black hole?",
    "Give me two reasons to drink more water.",
    "How do I write a for loop in Python?",
    "What is the main export of Brazil?",
    "Explain what inflation means.",
    "Suggest a name for a bakery.",
    "What should I do if I lose my passport?",
    "Why do cats purr?",
    "Turn this into a question: The train leaves at nine.",
    "What are the primary colors?",
    "Tell me something interesting about octopuses.",
];
