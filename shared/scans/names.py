"""Meaning of file and folder names for roles, pairs of image and label, and patients.

A name is split into words. Role words (``mask``, ``gts``, ``imagesTr``) separate images from labels and are then
removed; what is left is the key under which an image and its labels meet. Words for a part of a split, a contrast, a
time point or a side do not identify a patient.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from samgraft.shared.scans.readers.registry import scan_stem


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LABEL_WORDS = _word_set(
    "label labels labelled labeled labelmap labelmaps lbl lbls seg segs segm segmentation segmentations mask masks msk "
    "dseg gt gts groundtruth groundtruths annotation annotations annot annots contour contours roi rois"
)
_IMAGE_WORDS = _word_set(
    "image images imaging img imgs scan scans volume volumes vol vols data raw input inputs picture pictures"
)
# Words for a file format, which folders of images and of labels may or may not carry.
_FORMAT_WORDS = _word_set("dicom dcm nifti nii nrrd png tif tiff")
_ROLE_WORDS = _LABEL_WORDS | _IMAGE_WORDS | _FORMAT_WORDS
_PART_WORDS = {
    **dict.fromkeys(("tr", "train", "training", "trainset"), "train"),
    **dict.fromkeys(("ts", "te", "test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "va", "dev"), "val"),
}
# Words beside a role word that describe how a label was made and not what it shows.
_QUALIFIERS = _word_set("manual expert final corrected refined binary multi multiclass true gold standard all")
_CONTRASTS = _word_set(
    "t1 t2 t1w t2w t1ce t1c t1gd t1n t2f t2s pd pdw flair dwi adc swi dce bold asl ct cta mr mri mra pet cbct "
    "us xray cr dx mg axial coronal sagittal ax cor sag"
)
# Words for maps that programs compute from a scan, whose values are no intensities.
_DERIVED_WORDS = _word_set(
    "prob probs probability probabilities probmap softmax sigmoid logit logits uncertainty entropy variance confidence "
    "heatmap heatmaps saliency"
)
# Words that number the scans of one patient, with or without their number in the same word.
_REPEATS = _word_set(
    "frame fr time timepoint tp t ses session visit v scan phase day week month year slice slc z echo run acq rep "
    "series study exam fu followup"
)
_REPEAT = re.compile(rf"^(?:{'|'.join(sorted(_REPEATS, key=len, reverse=True))})\d*$")
_STATES = _word_set("pre post before after baseline followup ed es left right l r lcc rcc lmlo rmlo cc mlo rest stress")
_PLACEHOLDERS = _word_set(
    "anon anonymous anonymized anonymised anonym unknown none na nan null removed deidentified deid test patient "
    "noname noid id subject subj pseudonym redacted hidden empty default"
)
_JOINED = re.compile(r"(?i)(ground|label|time|follow)[-_. ]?(truth|maps?|point|up)s?(?![a-z])")
_NUMBERED_MODALITY = re.compile(r"(?:mr|ct|pet|us|cta|mra)\d{1,2}")
# Words before a number that separates stacks of pictures.
_OWNER = re.compile(r"(?:^|_)(?:p|pt|pat|patient|case|c|sub|subj|subject|id|vol|volume|study|series|ser|acc)_?$")
_UID = re.compile(r"\d+(?:\.\d+){3,}")
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
# Eight digits that are a day.
_DAY = re.compile(r"(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
_NUMBERED_ROLE = re.compile(r"^(?P<role>[A-Za-z]+)(?P<number>\d+)$")
_CAMEL_PART = re.compile(r"^(?P<role>[A-Za-z]+?)(?P<part>Tr|Ts|Te|Val|Va|Train|Test|TR|TS|tr|ts)$")


@dataclass(frozen=True)
class NamedFile:
    """One file name, split into the words that decide what it is."""

    folders: tuple[str, ...]
    """Words of the folders below the root, without role words."""
    words: tuple[str, ...]
    """Words of the file name in lower case, role words included."""
    role_index: int | None
    """Position of the first label word in ``words``."""
    in_label_folder: bool
    """True if the innermost role folder is one for labels."""
    original: tuple[str, ...]
    """Words of the file name in their own upper and lower case, for class names."""
    loose_folders: tuple[str, ...]
    """Words of the folders, where a folder with a role word gives no more than its part of the split."""
    class_folder: tuple[str, ...] = ()
    """Words of the innermost folder, in their own upper and lower case, if it is below a folder for labels."""

    @property
    def is_label(self) -> bool:
        """True if the name or a folder has a word for labels."""
        # ``segmentation_study/P1/image.nii`` is an image, while ``masks/img0001.png`` is a label like its neighbours.
        is_plainly_image = all(word in _IMAGE_WORDS for word in self.words)
        return self.role_index is not None or (self.in_label_folder and not is_plainly_image)

    @property
    def picture_classes(self) -> tuple[str, ...]:
        """Words after the role word of a picture's name, which separate the masks of one slice."""
        if self.role_index is None:
            return ()
        before, after = self.words[: self.role_index], self.words[self.role_index + 1 :]
        # In x_001_mask_1 the second number is that of the mask, in mask_001 the number is that of the slice.
        is_numbered = any(char.isdigit() for word in before for char in word)
        return tuple(word for word in after if is_numbered or not any(char.isdigit() for char in word))

    @property
    def slice_text(self) -> str:
        """Words of a picture's name that place it in a stack."""
        classes = self.picture_classes
        before = self.words if self.role_index is None else self.words[: self.role_index]
        after = () if self.role_index is None else self.words[self.role_index + 1 :]
        words = (*before, *(word for word in after if word not in classes))
        return "_".join(word for word in words if word not in _ROLE_WORDS)

    @property
    def key(self) -> tuple[str, ...]:
        """Folders and the words that are left without role words."""
        return (*self.folders, *(word for word in self.words if word not in _ROLE_WORDS))

    @property
    def loose_key(self) -> tuple[str, ...]:
        """Key in which folders such as ``Task1_Training_Input`` and ``Task1_GroundTruth_Training`` are equal."""
        return (*self.loose_folders, *self.key[len(self.folders) :])

    @property
    def key_of_case(self) -> tuple[str, ...]:
        """Key without the folders of contrasts, in which ``T1/P01`` and ``T2/P01`` are equal."""
        return (*(word for word in self.folders if word not in _CONTRASTS), *self.key[len(self.folders) :])

    @property
    def is_derived(self) -> bool:
        """True if the file name or a folder has a word for computed maps."""
        return any(word in _DERIVED_WORDS for word in self.key)

    @property
    def key_of_origin(self) -> tuple[str, ...]:
        """Key of the scan that a map was computed from."""
        return tuple(word for word in self.key if word not in _DERIVED_WORDS | {"map", "maps"})

    def label_candidates(self) -> Iterator[tuple[tuple[str, ...], str | None]]:
        """Yield (key of an image, class name) pairs to which this label may belong, the most exact first."""
        yield self.key, None
        if self.role_index is not None:
            for kept, rest in (
                (slice(None, self.role_index), slice(self.role_index + 1, None)),
                (slice(self.role_index + 1, None), slice(None, self.role_index)),
            ):
                words = [w for w in self.words[kept] if w not in _ROLE_WORDS]
                if words:
                    yield (*self.folders, *words), _class_name(self.original[rest])
        pairs = [(w, o) for w, o in zip(self.words, self.original, strict=True) if w not in _ROLE_WORDS]
        for end in range(len(pairs) - 1, 0, -1):
            yield (*self.folders, *(w for w, _ in pairs[:end])), _class_name([o for _, o in pairs[end:]])
        if self.class_folder:  # masks/liver/P01 beside images/P01
            above = self.folders[: len(self.folders) - len(self.class_folder)]
            yield (*above, *self.key[len(self.folders) :]), _class_name(self.class_folder)

    def class_beside(self, image: NamedFile) -> str | None:
        """Return the class that the whole name gives, for a label in the folder of its only image (``liver.nii.gz``).

        Words that the image has as well belong to the case. With them every case would have a class of its own.
        """
        return _class_name([word for word in self.original if word.lower() not in (*image.words, *image.folders)])


@dataclass(frozen=True)
class SliceGroup:
    """Pictures of one folder that are the slices of one stack."""

    name: str
    """What the names of the pictures share. Empty if all pictures of the folder are one stack."""
    members: tuple[int, ...]
    """Positions of the pictures in the list that was grouped, in the order of slices."""
    numbers: tuple[int, ...]
    """Slice number of each member, empty if the names have none that differs."""
    is_ordered: bool = True
    """False if the names have no numbers that order them."""


def group_slices(texts: Sequence[str]) -> list[SliceGroup]:
    """Group the names of pictures into stacks by the numbers in them.

    The last number that differs is that of the slice. Earlier numbers (``p1_s001``, ``p2_s001``) separate stacks if
    slice numbers are repeated, or if a word for patients or series is before them. Times of exposure are no such words.
    """
    families: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        families[re.sub(r"\d+", "#", text)].append(place)
    groups = [group for members in families.values() for group in _groups_of_family(texts, members)]
    if len(groups) == 1:
        return [replace(groups[0], name="")]
    if len(families) == len(texts):
        return [SliceGroup("", tuple(range(len(texts))), (), is_ordered=False)]
    return groups


def _groups_of_family(texts: Sequence[str], members: Sequence[int]) -> list[SliceGroup]:
    numbers = {place: [int(digits) for digits in re.findall(r"\d+", texts[place])] for place in members}
    differing = [i for i, column in enumerate(zip(*numbers.values(), strict=True)) if len(set(column)) > 1]
    if not differing:
        return [SliceGroup(texts[members[0]], tuple(members), ())]
    *earlier, last = differing
    words = re.split(r"\d+", texts[members[0]])
    is_repeated = len({numbers[place][last] for place in members}) < len(members)
    if not is_repeated:
        earlier = [i for i in earlier if _OWNER.search(words[i])]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place in sorted(members, key=lambda place: numbers[place]):
        groups[tuple(numbers[place][i] for i in earlier)].append(place)
    found = []
    for group in groups.values():
        digits = re.findall(r"\d+", texts[group[0]])
        parts = [word + ("" if i == last or i == len(digits) else digits[i]) for i, word in enumerate(words)]
        found.append(SliceGroup("".join(parts).strip("_"), tuple(group), tuple(numbers[p][last] for p in group)))
    return found


def split_name(relative: PurePath) -> NamedFile:
    """Split a path below the root of a source into words."""
    folders: list[str] = []
    loose: list[str] = []
    in_label_folder = False
    class_folder: list[str] = []
    for folder in relative.parent.parts:
        words = _words(folder)
        class_folder = _words(folder, lower=False) if in_label_folder else []
        has_role = any(word in _ROLE_WORDS for word in words)
        loose += [word for word in words if not has_role or word in _PART_WORDS.values()]
        # ``masks`` and ``labels_train`` are role folders; ``mask_study_07`` may be a patient's, its files decide.
        is_numbered = any(char.isdigit() for char in folder)
        if any(word in _LABEL_WORDS for word in words) and not is_numbered:
            in_label_folder = True
            words = [word for word in words if word not in _QUALIFIERS]
        elif any(word in _IMAGE_WORDS for word in words) and not is_numbered:
            in_label_folder = False
        folders += [word for word in words if word not in _ROLE_WORDS]
    # Class names keep their spelling (``Liver``), keys do not.
    original = _words(scan_stem(relative.name), lower=False)
    lowered = tuple(word.lower() for word in original)
    found = next((i for i, word in enumerate(lowered) if word in _LABEL_WORDS), None)
    # A folder with a role word or a number names no class.
    is_class = class_folder == [w for w in class_folder if w.lower() not in _ROLE_WORDS | _QUALIFIERS | _CONTRASTS]
    named = tuple(class_folder) if is_class and not any(map(_has_digit, class_folder)) else ()
    return NamedFile(tuple(folders), lowered, found, in_label_folder, tuple(original), tuple(loose), named)


def without_contrasts(folder: PurePath) -> PurePath:
    """Return a path without the folders of contrasts, in which scans of one patient have one name."""
    return PurePath(*(part for part in folder.parts if not all(word in _CONTRASTS for word in _words(part))))


def _has_digit(word: str) -> bool:
    return any(char.isdigit() for char in word)


def patient_folder(relative: PurePath) -> str | None:
    """Return the first folder of a path that can be a patient's, or None.

    Role folders, parts of a split and contrasts (``images``, ``train``, ``T1``) are skipped. A folder ``sub-01`` of
    BIDS counts wherever it is.
    """
    parts = relative.parent.parts
    return next((part for part in parts if _SUBJECT.fullmatch(part)), None) or next(
        (part for part in parts if not _is_general(part)), None
    )


def patient_of_stem(stem: str, *, is_file: bool = True) -> str:
    """Return a case id without the words that number scans of one patient.

    The name of a file may end with a channel of nnU-Net (``CASE_0000``); that of a folder may not, as ``OAS1_0001``.

    ``patient001_frame01`` and ``patient001_frame12`` are one patient, as are ``P01_T1_pre`` and ``P01_T2_post``. A
    merge that is wrong costs variety, while a split of one patient over train and test makes every result wrong.
    """
    parts = re.split(r"([-_. ]+)", stem)
    if _UID.fullmatch(stem):
        return stem  # its last number is no channel
    if is_file and re.fullmatch(r"0\d{3}", parts[-1]) and any(char.isdigit() for char in "".join(parts[-3:-1])):
        parts = parts[:-2]
    while len(parts) > 2:
        word, previous = parts[-1].lower(), parts[-3].lower()
        is_time_point = re.fullmatch(r"\d{3}", word) and re.fullmatch(r"\d{5,6}", previous)  # BraTS: 00123-001
        is_day = _DAY.fullmatch(word) and any(char.isdigit() for char in "".join(parts[:-2]))
        is_repeat = _REPEAT.match(word) or _NUMBERED_MODALITY.fullmatch(word) or is_time_point or is_day
        if word.isdecimal() and previous in _REPEATS:
            parts = parts[:-4]
        elif is_repeat or word in _CONTRASTS | _STATES | _ROLE_WORDS:
            parts = parts[:-2]
        else:
            break
    return "".join(parts) or stem


def is_placeholder_id(patient_id: str) -> bool:
    """Return whether a patient id is empty or a word that anonymisers write for every patient."""
    text = re.sub(r"[^a-z0-9]", "", patient_id.lower())
    return not text or set(text) <= {"0"} or set(text) <= {"x"} or text in _PLACEHOLDERS


def _class_name(words: Sequence[str]) -> str | None:
    """Return the class that words name, None for a number (one of several masks) or a description."""
    kept = [word for word in words if word.lower() not in _LABEL_WORDS | _IMAGE_WORDS | _QUALIFIERS]
    return "_".join(kept) if any(not word.isdecimal() for word in kept) else None


def _is_general(folder: str) -> bool:
    words = _words(folder)
    general = _ROLE_WORDS | _QUALIFIERS | _CONTRASTS | set(_PART_WORDS.values())
    if re.fullmatch(r"(?i)fold[-_ ]?\d+", folder):
        return True
    if any(word in _ROLE_WORDS for word in words) and any(word in _PART_WORDS.values() for word in words):
        return True  # Task1_Training_Input
    return all(word in general for word in words)


def _words(text: str, *, lower: bool = True) -> list[str]:
    # macOS writes an accent as a letter of its own, other systems do not.
    text = _JOINED.sub(lambda m: m[1] + m[2], unicodedata.normalize("NFC", text))
    words: list[str] = []
    for word in filter(None, re.split(r"[-_. ]+", text)):
        camel, numbered = _CAMEL_PART.match(word), _NUMBERED_ROLE.match(word)
        if camel and camel["role"].lower() in _ROLE_WORDS:  # imagesTr
            words += [camel["role"], _PART_WORDS[camel["part"].lower()]]
        elif numbered and numbered["role"].lower() in _ROLE_WORDS:  # img0001
            words += [numbered["role"], numbered["number"]]
        else:
            words.append(_PART_WORDS.get(word.lower(), word))
    return [word.lower() for word in words] if lower else words
