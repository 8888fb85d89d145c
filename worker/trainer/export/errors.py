"""Errors that refuse an export. The model itself is kept and published nevertheless."""

from tunery.errors import TuneryError


class ExportRefused(TuneryError):
    """The export failed a check."""

    code = "export_refused"


class MergeDiffers(ExportRefused):
    """The merged model's predictions differ from those of the adapter on its base: on {positions} labelled tokens the
    mean KL divergence is {mean_kl:.2g} (at most {most_kl:.2g}) and the likeliest token is the same for {top1:.2%} (at
    least {least_top1:.2%}). Serve the adapter on its base instead."""

    code = "merge_differs"


class FormatDiffers(ExportRefused):
    """In {format}, the model's predictions differ from those of its safetensors: on {positions} labelled tokens
    the mean KL divergence is {mean_kl:.2g} (at most {most_kl:.2g}) and the likeliest token is the same for {top1:.2%}
    (at least {least_top1:.2%}). Serve the safetensors instead."""

    code = "format_differs"


class FormatAnswersWorse(ExportRefused):
    """In {format}, the model answers worse than its safetensors: it gives the expected answer for {after:.1%} of {rows}
    rows, the safetensors for {before:.1%} (paired 95 % interval of the difference {low:+.1%} to {high:+.1%}). Export a
    format with more bits, or serve the safetensors."""

    code = "format_answers_worse"


class NoRoom(ExportRefused):
    """Merging needs {needed} of memory for the base in fp32, but only {available} is free. Omit 'export', or run the
    job on a host with more memory."""

    code = "no_room_to_merge"


class NoGguf(ExportRefused):
    """The model cannot be written as GGUF: {reason} Use the safetensors."""

    code = "no_gguf"


class NoRows(ExportRefused):
    """A merge is verified on rows, but all files of the model's job have been deleted. Serve the adapter on its base,
    or train again with 'export'."""

    code = "no_rows"
