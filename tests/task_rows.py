"""Rows in the schema of every task's data set, and the questions that they must become.

All made up. `Picture(n)` stands for a picture, which the tests draw and write in each of the forms that data sets have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)


@dataclass(frozen=True)
class Picture:
    number: int


@dataclass(frozen=True)
class Expected:
    id: str
    prompt: str
    target: dict[str, Any]
    cluster: str
    groups: dict[str, str] = field(default_factory=dict)
    pictures: tuple[int, ...] = (0,)


def right(*answers: str, **more: Any) -> dict[str, Any]:
    return {"answers": list(answers), **more}


TEN = ["two", "2", "two", "Two", "two", "three", "two", "two", "two", "two"]
VQA = [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(TEN, 1)]
ABC = ["ant", "bee", "cow"]
LINES = "\nA. ant\nB. bee\nC. cow"

ROWS: dict[str, list[dict[str, Any]]] = {
    "gqa": [
        {"id": "07333408", "imageId": "n161", "question": "Is it {red}?", "answer": "no", "image": Picture(0)},
        {"id": "07333409", "imageId": "n161", "question": "What is it?", "answer": "cup", "image": Picture(0)},
        {"id": "07333410", "imageId": "n162", "question": "Who?", "answer": "man", "image": Picture(1)},
    ],
    "vqav2": [
        {"question_id": 42000, "image_id": 42, "question": "How many?", "answers": VQA, "question_type": "how many",
         "answer_type": "number", "image": Picture(0)},
        {"question_id": 42001, "image_id": 42, "question": "How many now?", "answers": VQA, "question_type": "how many",
         "answer_type": "number", "image": Picture(0)},
        {"question_id": 73000, "image_id": 73, "question": "Is it?", "answers": VQA[:1], "question_type": "is it",
         "answer_type": "yes/no", "image": Picture(1)},
    ],
    "textvqa": [
        {"question_id": 34602, "image_id": "0054c9", "question": "what is the brand of THIS camera?", "answers": TEN,
         "ocr_tokens": ["DAKOTA", "digital"], "image": Picture(0)},
        {"question_id": 34603, "image_id": "0054c9", "question": "Who?", "answers": TEN, "ocr_tokens": [],
         "image": Picture(0)},
        {"question_id": 34604, "image_id": "7f", "question": "Where?", "answers": TEN, "ocr_tokens": ["a"],
         "image": Picture(1)},
    ],
    "vizwiz": [
        {"question_id": "val_0.jpg", "question": "ok. What is THIS?", "answers": TEN, "category": "other",
         "image": Picture(0)},
        {"question_id": "val_1.jpg", "question": "Can you see?", "answers": TEN, "category": "unanswerable",
         "image": Picture(1)},
        {"question_id": "val_2.jpg", "question": "Which?", "answers": TEN, "category": "other", "image": Picture(2)},
    ],
    "scienceqa-img": [
        {"question": "Which?", "hint": "[1, 2]", "choices": ABC, "answer": 1, "subject": "natural science",
         "image": Picture(0)},
        {"question": "Which two?", "hint": "", "choices": ABC[:2], "answer": 0, "subject": "social science",
         "image": Picture(1)},
        {"question": "And?", "hint": None, "choices": ABC, "answer": 2, "subject": "natural science",
         "image": Picture(2)},
    ],
    "pope": [
        {"question_id": "1", "question": "Is there a cat in the image?", "answer": "yes", "image_source": "COCO_1",
         "category": "adversarial", "image": Picture(0)},
        {"question_id": "2", "question": "Is there a dog in the image?", "answer": "no", "image_source": "COCO_1",
         "category": "adversarial", "image": Picture(0)},
        {"question_id": "1", "question": "Is there a cat in the image?", "answer": "yes", "image_source": "COCO_1",
         "category": "random", "image": Picture(0)},
    ],
    "mme": [
        {"question_id": "color/1.png", "question": " Is it red? Please answer yes or no.", "answer": "Yes",
         "category": "color", "image": Picture(0)},
        {"question_id": "color/1.png", "question": "Is it blue? Please answer yes or no.", "answer": "No",
         "category": "color", "image": Picture(0)},
        {"question_id": "OCR/1.png", "question": "Is it 4? Please answer yes or no.", "answer": "No",
         "category": "OCR", "image": Picture(1)},
    ],
    "mmbench-en": [
        {"index": 241, "question": "Which?", "hint": "It is small.", "A": "ant", "B": "bee", "C": "cow", "D": "nan",
         "answer": "B", "category": "ocr", "L2-category": "perception", "image": Picture(0)},
        {"index": 1000241, "question": "Which?", "hint": "It is small.", "A": "cow", "B": "ant", "C": "bee", "D": "nan",
         "answer": "C", "category": "ocr", "L2-category": "perception", "image": Picture(0)},
        {"index": 252, "question": "Why?", "hint": "nan", "A": "[1, 2]", "B": "None", "C": None, "D": None,
         "answer": "A", "category": "logic", "L2-category": "reasoning", "image": Picture(1)},
    ],
    "seed": [
        {"question_id": "101", "data_id": "12_34", "data_type": "image", "question": "Which?", "choice_a": "ant",
         "choice_b": "bee", "choice_c": "cow", "choice_d": "dog", "answer": "D", "question_type_id": 1,
         "image": Picture(0)},
        {"question_id": "v101", "data_id": "9", "data_type": "video", "question": "When?", "choice_a": "ant",
         "choice_b": "bee", "choice_c": "cow", "choice_d": "dog", "answer": "A", "question_type_id": 10,
         "image": Picture(1)},
        {"question_id": "102", "data_id": "12_34", "data_type": "image", "question": "Who?", "choice_a": "1",
         "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "A", "question_type_id": 2, "image": Picture(0)},
    ],
    "docvqa": [
        {"questionId": "49153", "docId": 14465, "question": "What is the ‘actual’ value?", "answers": ["0.28", "28%"],
         "image": Picture(0)},
        {"questionId": "49154", "docId": 14465, "question": "Who?", "answers": ["ITC"], "image": Picture(0)},
        {"questionId": "49155", "docId": 14466, "question": "When?", "answers": ["1999"], "image": Picture(1)},
    ],
    "infovqa": [
        {"questionId": "98313", "image_url": "https://x.org/1.jpg", "question": "Which?", "answers": ["LinkedIn"],
         "image": Picture(0)},
        {"questionId": "98314", "image_url": "https://x.org/1.jpg", "question": "How many?", "answers": ["4", "four"],
         "image": Picture(0)},
        {"questionId": "98315", "image_url": "https://x.org/2.jpg", "question": "Who?", "answers": ["4"],
         "image": Picture(1)},
    ],
    "chartqa": [
        {"type": "human_test", "question": "How many bars?", "answer": "14", "image": Picture(0)},
        {"type": "human_test", "question": "How much?", "answer": "0.57", "image": Picture(0)},
        {"type": "augmented_test", "question": "Which?", "answer": "Inspired", "image": Picture(1)},
    ],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "what is written in the image? ", "question_type": "Regular Text Recognition",
         "answer": ["CENTRE"], "image": Picture(0)},
        {"dataset": "ESTVQA", "question": "Where?", "question_type": "Scene Text-centric VQA", "answer": ["a", "b"],
         "image": Picture(1)},
        {"dataset": "HME100k", "question": "Which?", "question_type": "Handwritten", "answer": ["x ^ { 2 }"],
         "image": Picture(2)},
    ],
    "ai2d": [
        {"question": "What eats grass?", "options": ABC, "answer": "2", "image": Picture(0)},
        {"question": "What flies?", "options": ABC, "answer": "1", "image": Picture(0)},
        {"question": "What walks?", "options": ABC[:1], "answer": "0", "image": Picture(1)},
    ],
    "mmmu": [
        {"id": "validation_Art_1", "question": "<image 1> Compare with <image 2>.", "options": "['ant', \"bee's\"]",
         "answer": "B", "question_type": "multiple-choice", "subfield": "Drawing", "image_1": Picture(0),
         "image_2": Picture(1), "image_3": Picture(2)},
        {"id": "validation_Math_2", "question": "How much is <image 1>?", "options": "[]", "answer": "3.14",
         "question_type": "open", "subfield": "Algebra", "image_1": Picture(2), "image_2": None, "image_3": None},
        {"id": "validation_Math_3", "question": "Which?", "options": "['<image 2>', '<image 1>']", "answer": "A",
         "question_type": "multiple-choice", "subfield": "Algebra", "image_1": Picture(0), "image_2": Picture(1),
         "image_3": None},
    ],
    "realworldqa": [
        {"image_path": "0.webp", "question": "Which?\n\nA. ant\nB. bee\nPlease answer with the letter.\n",
         "answer": "A", "image": Picture(0)},
        {"image_path": "0.webp", "question": "How many? Please answer with a single word.", "answer": "Two",
         "image": Picture(0)},
        {"image_path": "1.webp", "question": "Stop?", "answer": "No", "image": Picture(1)},
    ],
    "mmstar": [
        {"index": 0, "question": "Which?\nOptions: A: ant, B: bee ", "answer": "A", "category": "math",
         "l2_category": "geometry", "image": Picture(0)},
        {"index": 1, "question": "Is it? Please answer yes or no.", "answer": "B", "category": "math",
         "l2_category": "geometry", "image": Picture(1)},
        {"index": 2, "question": "Who?", "answer": "C", "category": "logical reasoning", "l2_category": "diagram",
         "image": Picture(2)},
    ],
    "hallusionbench": [
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1", "question_id": "0",
         "question": "Is it larger?", "gt_answer": "1", "image": Picture(0)},
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "2", "question_id": "0",
         "question": "Is it larger?", "gt_answer": "0", "image": Picture(1)},
        {"category": "VS", "subcategory": "map", "set_id": "3", "figure_id": "1", "question_id": "1",
         "question": "Is it there?", "gt_answer": "1", "image": Picture(2)},
    ],
    "refcoco": [
        {"question_id": "1719310", "answer": ["left cat", "the tabby"], "bbox": [2.0, 3.5, 10.0, 4.0],
         "file_name": "COCO_1_0.jpg", "image": Picture(0)},
        {"question_id": "1719311", "answer": ["right cat"], "bbox": [0.0, 0.0, 5.0, 5.0], "file_name": "COCO_2_0.jpg",
         "image": Picture(1)},
        {"question_id": "1719312", "answer": ["all"], "bbox": [0.0, 0.0, 30.0, 22.0], "file_name": "COCO_2_1.jpg",
         "image": Picture(2)},
    ],
}  # fmt: skip
ROWS["textvqa-ocr"] = ROWS["textvqa"]
ROWS["mmbench-cn"] = ROWS["mmbench-en"]
for _name in ("testa", "testb", "plus", "plus-testa", "plus-testb"):
    ROWS[f"refcoco-{_name}"] = ROWS["refcoco"]
ROWS["refcocog"] = ROWS["refcocog-test"] = ROWS["refcoco"]

_MMBENCH = (
    ("241", "It is small. Which?", LINES, right("B", choices=ABC), "241", "ocr", "perception", 0),
    ("1000241", "It is small. Which?", "\nA. cow\nB. ant\nC. bee", right("C", choices=["cow", "ant", "bee"]), "241",
     "ocr", "perception", 0),
    ("252", "Why?", "\nA. [1, 2]\nB. None", right("A", choices=["[1, 2]", "None"]), "252", "logic", "reasoning", 1),
)  # fmt: skip
_CHINESE = "\n\n请直接使用所提供的选项字母作为答案回答。"
_OCR_LINE = "\nReference OCR token: "

EXPECTED: dict[str, list[Expected]] = {
    "gqa": [
        Expected("07333408", f"Is it {{red}}?{WORD}", right("no"), "n161"),
        Expected("07333409", f"What is it?{WORD}", right("cup"), "n161"),
        Expected("07333410", f"Who?{WORD}", right("man"), "n162", pictures=(1,)),
    ],
    "vqav2": [
        Expected("42000", f"How many?{WORD}", right(*TEN), "42", {"category": "how many"}),
        Expected("42001", f"How many now?{WORD}", right(*TEN), "42", {"category": "how many"}),
        Expected("73000", f"Is it?{WORD}", right("two"), "73", {"category": "is it"}, (1,)),
    ],
    "textvqa": [
        Expected("34602", f"What is the brand of this camera?{WORD}", right(*TEN), "0054c9"),
        Expected("34603", f"Who?{WORD}", right(*TEN), "0054c9"),
        Expected("34604", f"Where?{WORD}", right(*TEN), "7f", pictures=(1,)),
    ],
    "textvqa-ocr": [
        Expected("34602", f"What is the brand of this camera?{_OCR_LINE}DAKOTA, digital{WORD}", right(*TEN), "0054c9"),
        Expected("34603", f"Who?{WORD}", right(*TEN), "0054c9"),
        Expected("34604", f"Where?{_OCR_LINE}a{WORD}", right(*TEN), "7f", pictures=(1,)),
    ],
    "vizwiz": [
        Expected(f"val_{number}.jpg",
                 f"{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.{WORD}",
                 right(*TEN), f"val_{number}.jpg", {"category": category}, (number,))
        for number, (question, category) in enumerate(
            [("Ok. what is this?", "other"), ("Can you see?", "unanswerable"), ("Which?", "other")])
    ],
    "scienceqa-img": [
        Expected("0", f"Context: [1, 2]\nWhich?{LINES}{LETTER}", right("B", choices=ABC), "0",
                 {"category": "natural science"}),
        Expected("1", f"Which two?\nA. ant\nB. bee{LETTER}", right("A", choices=ABC[:2]), "1",
                 {"category": "social science"}, (1,)),
        Expected("2", f"And?{LINES}{LETTER}", right("C", choices=ABC), "2", {"category": "natural science"}, (2,)),
    ],
    "pope": [
        Expected("adversarial-1", f"Is there a cat in the image?{WORD}", right("yes"), "COCO_1",
                 {"category": "adversarial"}),
        Expected("adversarial-2", f"Is there a dog in the image?{WORD}", right("no"), "COCO_1",
                 {"category": "adversarial"}),
        Expected("random-1", f"Is there a cat in the image?{WORD}", right("yes"), "COCO_1", {"category": "random"}),
    ],
    "mme": [
        Expected("color/color/1.png/0", f"Is it red?{WORD}", right("Yes"), "color/color/1.png",
                 {"category": "color", "image": "color/1.png"}),
        Expected("color/color/1.png/1", f"Is it blue?{WORD}", right("No"), "color/color/1.png",
                 {"category": "color", "image": "color/1.png"}),
        Expected("OCR/OCR/1.png/0", f"Is it 4?{WORD}", right("No"), "OCR/OCR/1.png",
                 {"category": "OCR", "image": "OCR/1.png"}, (1,)),
    ],
    "mmbench-en": [
        Expected(index, f"{question} There are several options:{lines}\n{LETTER}", target, cluster,
                 {"category": category, "l2_category": l2, "index": index}, (picture,))
        for index, question, lines, target, cluster, category, l2, picture in _MMBENCH
    ],
    "mmbench-cn": [
        Expected(index, f"{question} 有如下几个选项：{lines}{_CHINESE}", target, cluster,
                 {"category": category, "l2_category": l2, "index": index}, (picture,))
        for index, question, lines, target, cluster, category, l2, picture in _MMBENCH
    ],
    "seed": [
        Expected("101", f"Which?{LINES}\nD. dog{LETTER}", right("D", choices=[*ABC, "dog"]), "12_34",
                 {"category": "1"}),
        Expected("102", f"Who?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}", right("A", choices=["1", "2", "3", "4"]), "12_34",
                 {"category": "2"}),
    ],
    "docvqa": [
        Expected("49153", f"What is the ‘actual’ value?{WORD}", right("0.28", "28%"), "14465"),
        Expected("49154", f"Who?{WORD}", right("ITC"), "14465"),
        Expected("49155", f"When?{WORD}", right("1999"), "14466", pictures=(1,)),
    ],
    "infovqa": [
        Expected("98313", f"Which?{WORD}", right("LinkedIn"), "https://x.org/1.jpg"),
        Expected("98314", f"How many?{WORD}", right("4", "four"), "https://x.org/1.jpg"),
        Expected("98315", f"Who?{WORD}", right("4"), "https://x.org/2.jpg", pictures=(1,)),
    ],
    "chartqa": [
        Expected(str(number), f"{question}\nAnswer the question with a single word.", right(answer), str(number),
                 {"category": category}, (picture,))
        for number, (question, answer, category, picture) in enumerate([
            ("How many bars?", "14", "human_test", 0), ("How much?", "0.57", "human_test", 0),
            ("Which?", "Inspired", "augmented_test", 1)])
    ],
    "ocrbench": [
        Expected("0", "what is written in the image?", right("CENTRE"), "0",
                 {"category": "Regular Text Recognition", "dataset": "IIIT5K"}),
        Expected("1", "Where?", right("a", "b"), "1",
                 {"category": "Scene Text-centric VQA", "dataset": "ESTVQA"}, (1,)),
        Expected("2", "Which?", right("x ^ { 2 }"), "2", {"category": "Handwritten", "dataset": "HME100k"}, (2,)),
    ],
    "ai2d": [
        Expected("0", f"What eats grass?{LINES}{LETTER}", right("C", choices=ABC), "0"),
        Expected("1", f"What flies?{LINES}{LETTER}", right("B", choices=ABC), "1"),
        Expected("2", f"What walks?\nA. ant{LETTER}", right("A", choices=["ant"]), "2", pictures=(1,)),
    ],
    "mmmu": [
        Expected("validation_Art_1", f"<image 1> Compare with <image 2>.\nA. ant\nB. bee's\n{LETTER}",
                 right("B", choices=["ant", "bee's"]), "validation_Art_1",
                 {"category": "Drawing", "kind": "multiple-choice"}, (0, 1)),
        Expected("validation_Math_2", f"How much is <image 1>?\n{WORD}", right("3.14"), "validation_Math_2",
                 {"category": "Algebra", "kind": "open"}, (2,)),
        Expected("validation_Math_3", f"Which?\nA. <image 2>\nB. <image 1>\n{LETTER}",
                 right("A", choices=["<image 2>", "<image 1>"]), "validation_Math_3",
                 {"category": "Algebra", "kind": "multiple-choice"}, (0, 1)),
    ],
    "realworldqa": [
        Expected("0", "Which?\n\nA. ant\nB. bee\nPlease answer with the letter.", right("A"), "0.webp"),
        Expected("1", "How many? Please answer with a single word.", right("Two"), "0.webp"),
        Expected("2", "Stop?", right("No"), "1.webp", pictures=(1,)),
    ],
    "mmstar": [
        Expected(str(number), f"{question}{LETTER[:-1]}", right("ABC"[number]), str(number),
                 {"category": category, "l2_category": l2}, (number,))
        for number, (question, category, l2) in enumerate([
            ("Which?\nOptions: A: ant, B: bee", "math", "geometry"), ("Is it?", "math", "geometry"),
            ("Who?", "logical reasoning", "diagram")])
    ],
    "hallusionbench": [
        Expected("VD-chart-0-1-0", "Is it larger?", right("yes"), "VD-chart-0",
                 {"category": "VD", "subcategory": "chart", "set": "0", "figure": "1", "question": "0"}),
        Expected("VD-chart-0-2-0", "Is it larger?", right("no"), "VD-chart-0",
                 {"category": "VD", "subcategory": "chart", "set": "0", "figure": "2", "question": "0"}, (1,)),
        Expected("VS-map-3-1-1", "Is it there?", right("yes"), "VS-map-3",
                 {"category": "VS", "subcategory": "map", "set": "3", "figure": "1", "question": "1"}, (2,)),
    ],
    "refcoco": [
        Expected("1719310-0", f"{BOX}left cat", right(box=[2.0, 3.5, 12.0, 7.5], size=[16, 12]), "COCO_1_0.jpg"),
        Expected("1719310-1", f"{BOX}the tabby", right(box=[2.0, 3.5, 12.0, 7.5], size=[16, 12]), "COCO_1_0.jpg"),
        Expected("1719311-0", f"{BOX}right cat", right(box=[0.0, 0.0, 5.0, 5.0], size=[17, 12]), "COCO_2_0.jpg",
                 pictures=(1,)),
        Expected("1719312-0", f"{BOX}all", right(box=[0.0, 0.0, 30.0, 22.0], size=[18, 12]), "COCO_2_1.jpg",
                 pictures=(2,)),
    ],
}  # fmt: skip
for _name in ROWS:
    if _name.startswith("refcoco"):
        EXPECTED[_name] = EXPECTED["refcoco"]
