"""Figures as Plotly values, and the report: all are drawn from records.

Nothing is shown or written but the report, and nothing is measured.
"""

from xmodel_steer.figures.choices import curve as curve
from xmodel_steer.figures.choices import effect_by_layer as effect_by_layer
from xmodel_steer.figures.doses import dose_response as dose_response
from xmodel_steer.figures.doses import frontier as frontier
from xmodel_steer.figures.geometry import mapped_scatter as mapped_scatter
from xmodel_steer.figures.geometry import vector_geometry as vector_geometry
from xmodel_steer.figures.layers import data_curve as data_curve
from xmodel_steer.figures.layers import layer_grid as layer_grid
from xmodel_steer.figures.layers import patching as patching
from xmodel_steer.figures.overviews import overview as overview
from xmodel_steer.figures.pairing import show_alignment as show_alignment
from xmodel_steer.figures.pairing import show_projection as show_projection
from xmodel_steer.figures.report import summary as summary
from xmodel_steer.figures.report import tables as tables
from xmodel_steer.figures.report import write_report as write_report
