"""Errors that refuse an export. The model itself is kept and published nevertheless."""

from tunery.errors import TuneryError


class ExportRefused(TuneryError):
    """The export was refused."""

    code = "export_refused"


class MergeDiffers(ExportRefused):
    """The merged model does not predict as the adapter on its base does: on {positions} labelled tokens the mean KL
    divergence is {mean_kl:.2g} (at most {most_kl:.2g}) and the likeliest token is the same for {top1:.2%} (at least
    {least_top1:.2%}). Serve the adapter on its base instead."""

    code = "merge_differs"


class FormatDiffers(ExportRefused):
    """As {format} the model does not predict as the whole model does: on {positions} labelled tokens the mean KL
    divergence is {mean_kl:.2g} (at most {most_kl:.2g}) and the likeliest token is the same for {top1:.2%} (at least
    {least_top1:.2%}). Serve the whole model's safetensors instead."""

    code = "format_differs"


class FormatAnswersWorse(ExportRefused):
    """As {format} the model answers worse than the whole model: it gives the wanted answer to {after:.1%} of {rows}
    rows, the whole model to {before:.1%} (paired 95 % interval of the difference {low:+.1%} to {high:+.1%}). Export a
    wider format, or serve the whole model's safetensors."""

    code = "format_answers_worse"


class NoRoom(ExportRefused):
    """Merging takes {needed} of memory for the base in fp32, and {available} are free. Leave 'export' out, or run the
    job on a host with more memory."""

    code = "no_room_to_merge"


class NoGguf(ExportRefused):
    """The model cannot be written as GGUF: {reason} Use the safetensors."""

    code = "no_gguf"


class NoRows(ExportRefused):
    """A merge is proven on rows, and all files of the model's job are deleted. Serve the adapter on its base, or train
    again with 'export'."""

    code = "no_rows"
